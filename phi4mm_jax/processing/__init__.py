"""From what a user hands in (messages, text, pictures, sound) to the arrays that the model takes; numpy only."""
