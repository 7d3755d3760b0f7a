"""Writes hub/, native/, media/, cases.json and model.npz beside this file: a tiny model and the original's results.

The network is the one in transformers, in float32 on one thread, with four behaviours of the original remote code put
back: masked audio keys are masked, the image tower is bidirectional and gives padded patches no attention output, patch
positions come from linspace, and a sequence that passes the short rope factors is computed anew with the long ones.
Preprocessing is that of make_processing.py. Needs torch and transformers 5.23; takes about ten seconds, and the same
versions give the same bytes.

    python tests/golden/make_golden.py
"""

import json
import math
import re
import shutil
import wave
from pathlib import Path

import make_processing as processing
import numpy as np
import torch
import transformers.models.phi4_multimodal.modeling_phi4_multimodal as modeling
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional
from transformers import DynamicCache, Phi4MultimodalConfig, Phi4MultimodalForCausalLM
from transformers.utils.output_capturing import maybe_install_capturing_hooks

HERE = Path(__file__).parent

IMAGE, AUDIO, PAD, END = 500, 501, 505, 506
SHORT_RANGE, LONG_RANGE = 64, 512
SHORT_FACTOR, LONG_FACTOR = [1.0, 1.05, 1.2], [1.0, 2.5, 9.0]
SIDE, PATCH, MAX_CROPS = processing.SIDE, processing.PATCH, processing.MAX_CROPS
TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SPEECH = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_blocks": 2,
    "num_attention_heads": 3,
    "nemo_conv_channels": 8,
    "bias_max_distance": 300,
}
ADAPTERS = {"vision": {"r": 4, "lora_alpha": 12}, "speech": {"r": 6, "lora_alpha": 9}}
TARGETS = {"qkv_proj": "self_attn", "o_proj": "self_attn", "gate_up_proj": "mlp", "down_proj": "mlp"}

PICTURES = {"tiles": (150, 95), "bottom": (100, 80), "right": (80, 100), "tall": (48, 120), "exact": (70, 35)}
"""Width and height: 3x2 crops; an odd number of padded patch rows; of columns; 1x3 crops; no padding at all."""
CLIPS = {"clip": 14637, "short": 8305}
"""Samples at 16 kHz."""


# --- the original's behaviour --------------------------------------------------------------------------------


class ImageMask:
    """The patch mask of the crops that the image tower is working on."""

    rows = None


def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.nan_to_num(torch.softmax(scores, -1), nan=0.0)  # a query without keys gives zeros
    out = torch.matmul(weights, value).transpose(1, 2).contiguous()
    if isinstance(module, modeling.Phi4MultimodalVisionAttention):
        out = out * ImageMask.rows[:, :, None, None]
    return out, weights


def embed_patches(self, pixel_values, patch_attention_mask):
    count, side = len(pixel_values), self.num_patches_per_side
    patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
    bounds = torch.arange(1 / side, 1.0, 1 / side)
    positions = torch.zeros(count, side * side, dtype=torch.long)
    for i, mask in enumerate(patch_attention_mask):
        rows, columns = (
            torch.bucketize(torch.linspace(0, 1 - 1 / n, n), bounds, right=True)
            for n in (mask[:, 0].sum(), mask[0].sum())
        )
        positions[i][mask.reshape(-1)] = (rows[:, None] * side + columns).flatten()
    ImageMask.rows = patch_attention_mask.reshape(count, -1).float()
    return patches + self.position_embedding(positions)


def encode_audio(self, features, mask, **_):
    """Conformer with a key mask; keeps its intermediate results in `self.seen`."""
    x, mask = self.embed(self.encoder_embedding(features), mask)
    self.seen = [x]
    batch, length, width = x.shape
    window = min(length, 500)
    padding = -length % window
    x = functional.pad(x, (0, 0, 0, padding)).reshape(-1, window, width)
    bias = self.relative_attention_bias_layer(x)
    if mask is not None:
        keys = functional.pad(mask.squeeze(1), (0, padding), value=False).reshape(-1, window)
        bias = bias + torch.zeros(keys.shape).masked_fill(~keys, -math.inf)[:, None, None, :]
    for layer in self.encoders:
        x = layer(x, bias)
        self.seen.append(x)
    return x.reshape(batch, -1, width)[:, :length]


class Adapted(torch.nn.Module):
    """A linear layer with the adapter that is switched on for all of them."""

    active = None

    def __init__(self, base, pairs):
        super().__init__()
        self.base, self.pairs = base, pairs

    def forward(self, x):
        y = self.base(x)
        if Adapted.active is None:
            return y
        a, b = self.pairs[Adapted.active]
        settings = ADAPTERS[Adapted.active]
        return y + functional.linear(functional.linear(x, a), b) * (settings["lora_alpha"] / settings["r"])


modeling.simple_eager_attention_forward = attention
modeling.Phi4MultimodalVisionEmbeddings.forward = embed_patches
modeling.Phi4MultimodalAudioModel.forward = encode_audio


# --- weights -------------------------------------------------------------------------------------------------


def build():
    """Returns the model and its adapters: (layer, module, adapter) -> (A, B)."""
    config = Phi4MultimodalConfig(
        **TEXT,
        max_position_embeddings=LONG_RANGE,
        original_max_position_embeddings=SHORT_RANGE,
        tie_word_embeddings=True,
        sliding_window=262144,
        bos_token_id=PAD,
        pad_token_id=PAD,
        eos_token_id=[PAD, END],
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": SHORT_FACTOR,
            "long_factor": LONG_FACTOR,
            "original_max_position_embeddings": SHORT_RANGE,
        },
        vision_config={"image_size": SIDE, "crop_size": SIDE, "patch_size": PATCH, "image_token_id": IMAGE, **VISION},
        audio_config={
            "audio_token_id": AUDIO,
            "ext_pw_out_channel": SPEECH["hidden_size"],
            "depthwise_separable_out_channel": SPEECH["hidden_size"],
            **SPEECH,
        },
    )
    config._attn_implementation = "eager"
    model = Phi4MultimodalForCausalLM(config).eval().float()
    random = torch.Generator().manual_seed(4)
    fill(model, random)
    adapters = {}
    for i, layer in enumerate(model.model.layers):
        for name, parent in TARGETS.items():
            linear = getattr(getattr(layer, parent), name)
            for adapter, settings in ADAPTERS.items():
                a = torch.randn(settings["r"], linear.in_features, generator=random) / math.sqrt(linear.in_features)
                b = torch.randn(linear.out_features, settings["r"], generator=random) * 0.3 / math.sqrt(settings["r"])
                adapters[i, f"{parent}.{name}", adapter] = a, b
    return model, adapters


def fill(model, random):
    """Draws every weight at a size that keeps all parts of the network at work."""
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if "global_" in name]
    for name, weight in sorted([*model.named_parameters(), *buffers]):
        mean, deviation = 0.0, 1.0
        if "global_mean" in name:
            mean, deviation = 8.0, 2.0
        elif "global_invstd" in name:
            mean, deviation = 0.25, 0.03
        elif "embed_tokens.weight" in name:
            deviation = 0.3
        elif "position_embedding" in name or "bias_values" in name:
            deviation = 0.5
        elif "norm" in name and name.endswith("weight"):
            mean, deviation = 1.0, 0.2
        elif weight.ndim == 1 and "feature_extensor" not in name:
            deviation = 0.1
        elif weight.ndim > 1:
            gain = 1.4 if re.search(r"\b(q|k|qkv)_proj", name) else 1.0
            deviation = gain / math.sqrt(math.prod(weight.shape[1:]))
        with torch.no_grad():
            weight.copy_(mean + deviation * torch.randn(weight.shape, generator=random))
    model.tie_weights()


def attach(model, adapters):
    for i, layer in enumerate(model.model.layers):
        for name, parent in TARGETS.items():
            module = getattr(layer, parent)
            pairs = {adapter: adapters[i, f"{parent}.{name}", adapter] for adapter in ADAPTERS}
            setattr(module, name, Adapted(getattr(module, name), pairs))


# --- checkpoints ---------------------------------------------------------------------------------------------

HUB_NAMES = [
    (r"(\.feed_forward_(?:in|out))\.gate_up_proj\.", r"\1.net.0.linear."),
    (r"(\.feed_forward_(?:in|out))\.down_proj\.", r"\1.net.2."),
    (r"(encoders\.\d+\.self_attn)\.(q|k|v)_proj\.", r"\1.linear_\2."),
    (r"(encoders\.\d+\.self_attn)\.o_proj\.", r"\1.linear_out."),
    (r"\.img_projection_up\.", ".img_projection.0."),
    (r"\.img_projection_down\.", ".img_projection.2."),
    (r"\.global_img_feature_extensor$", ".glb_GN"),
    (r"\.sub_img_feature_extensor$", ".sub_GN"),
    (r"\.up_proj_for_speech\.", ".audio_projection.speech.0."),
    (r"\.down_proj_for_speech\.", ".audio_projection.speech.2."),
    (r"\.up_proj_for_vision_speech\.", ".audio_projection.vision.0."),
    (r"\.down_proj_for_vision_speech\.", ".audio_projection.vision.2."),
    (r"^(model\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj)\.weight$", r"\1.base_layer.weight"),
]


def hub_name(name):
    for pattern, replacement in HUB_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def write_checkpoints(model, adapters):
    hub, native = HERE / "hub", HERE / "native"
    for directory in (hub, native):
        directory.mkdir(exist_ok=True)
        shutil.copy(HERE / "tokenizer.json", directory)
    model.save_pretrained(native)
    tensors = {hub_name(k): v.clone() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for adapter, settings in ADAPTERS.items():
        parts = {}
        for (i, module, name), pair in adapters.items():
            if name == adapter:
                for letter, weight in zip("AB", pair, strict=True):
                    parts[f"model.layers.{i}.{module}.lora_{letter}.weight"] = weight
                    tensors[f"model.layers.{i}.{module}.lora_{letter}.{adapter}.weight"] = weight
        folder = native / f"{adapter}-lora"
        folder.mkdir(exist_ok=True)
        save_file(parts, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(folder / "adapter_config.json", {"peft_type": "LORA", "task_type": "CAUSAL_LM", **settings})
    save_file(tensors, hub / "model.safetensors", metadata={"format": "pt"})
    write_json(hub / "config.json", hub_config())


def hub_config():
    """What the released config.json says, and under `_tiny_overrides` what the original hard-codes."""
    return {
        **TEXT,
        "model_type": "phi4mm",
        "max_position_embeddings": LONG_RANGE,
        "original_max_position_embeddings": SHORT_RANGE,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope", "short_factor": SHORT_FACTOR, "long_factor": LONG_FACTOR},
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "pad_token_id": PAD,
        "eos_token_id": PAD,
        "audio_processor": {
            "name": "cascades",
            "config": {
                "attention_dim": SPEECH["hidden_size"],
                "attention_heads": SPEECH["num_attention_heads"],
                "input_size": 80,
                "kernel_size": 3,
                "linear_units": SPEECH["intermediate_size"],
                "nemo_conv_settings": {"conv_channels": SPEECH["nemo_conv_channels"]},
                "num_blocks": SPEECH["num_blocks"],
                "relative_attention_bias_args": {"t5_bias_max_distance": SPEECH["bias_max_distance"], "type": "t5"},
                "time_reduction": 8,
            },
        },
        "embd_layer": {"image_embd_layer": {"crop_size": SIDE}},
        **{f"{adapter}_lora": settings for adapter, settings in ADAPTERS.items()},
        "_tiny_overrides": {
            "image_token_id": IMAGE,
            "audio_token_id": AUDIO,
            "end_token_id": END,
            "dynamic_hd": MAX_CROPS,
            "vision": {"image_size": SIDE, "patch_size": PATCH, **VISION},
        },
    }


# --- media ---------------------------------------------------------------------------------------------------


def write_media():
    """Returns what the network takes of each picture and of each clip."""
    folder = HERE / "media"
    folder.mkdir(exist_ok=True)
    pictures, clips = {}, {}
    for name, size in PICTURES.items():
        image = processing.picture(*size, seed=len(name))
        Image.fromarray(image).save(folder / f"{name}.png", optimize=True)
        pictures[name] = picture_features(image)
    for name, count in CLIPS.items():
        samples = processing.wave(1.0, 16000, seed=count)[:count]
        with wave.open(str(folder / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", None))
            file.writeframes(samples.tobytes())
        clips[name] = torch.from_numpy(processing.log_mel(samples / 32768, 16000))
    return pictures, clips


def picture_features(image):
    height, width, _ = image.shape
    columns, rows, new_width, new_height, masked_columns, masked_rows, tokens = processing.plan(
        width, height, SIDE, PATCH, MAX_CROPS
    )
    padded = np.full((rows * SIDE, columns * SIDE, 3), 255, np.uint8)
    padded[:new_height, :new_width] = processing.bilinear(image, new_width, new_height)
    pixels = (padded / 255 - 0.5) / 0.5
    per_side = SIDE // PATCH
    mask = np.ones((rows * per_side, columns * per_side), bool)
    mask[rows * per_side - masked_rows :] = False
    mask[:, columns * per_side - masked_columns :] = False
    tiles = pixels.reshape(rows, SIDE, columns, SIDE, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, SIDE, SIDE)
    masks = mask.reshape(rows, per_side, columns, per_side).transpose(0, 2, 1, 3).reshape(-1, per_side, per_side)
    crops = np.concatenate([processing.bicubic(pixels, SIDE)[None], tiles]).astype(np.float32)
    masks = np.concatenate([np.ones((1, per_side, per_side), bool), masks])
    return {
        "crops": torch.from_numpy(crops),
        "mask": torch.from_numpy(masks).float(),
        "size": padded.shape[:2],
        "tokens": tokens,
    }


def image_inputs(pictures):
    """Pictures of one prompt, padded to the same number of crops."""
    most = max(len(p["crops"]) for p in pictures)
    extra = [most - len(p["crops"]) for p in pictures]
    return {
        "image_pixel_values": torch.stack(
            [functional.pad(p["crops"], (0, 0) * 3 + (0, n)) for p, n in zip(pictures, extra, strict=True)]
        ),
        "image_attention_mask": torch.stack(
            [functional.pad(p["mask"], (0, 0) * 2 + (0, n), value=1.0) for p, n in zip(pictures, extra, strict=True)]
        ),
        "image_sizes": torch.tensor([p["size"] for p in pictures]),
    }


def audio_inputs(clips):
    """Clips of one prompt, padded to the same length, with a mask where there are several."""
    frames = max(map(len, clips))
    inputs = {
        "audio_input_features": torch.stack([functional.pad(c, (0, 0, 0, frames - len(c))) for c in clips]),
        "audio_embed_sizes": torch.tensor([audio_tokens(c) for c in clips]),
    }
    if len(clips) > 1:
        inputs["audio_attention_mask"] = torch.stack([torch.arange(frames) < len(c) for c in clips])
    return inputs


def audio_tokens(clip):
    return -(-len(clip) // 8)


# --- cases ---------------------------------------------------------------------------------------------------


def prompts(pictures, clips):
    """Each case as parts: a number of text tokens, a picture or a clip."""
    cases = {
        "text": [21],
        "text_long": [SHORT_RANGE + 30],
        "image_bottom": [3, "bottom", 9],
        "image_exact": [3, "exact", 6],
        "images": [2, "tiles", 4, "right", 5],
        "audio": [3, "clip", 8],
        "audios": [3, "clip", 2, "short", 6],
        "image_audio": [2, "tall", "clip", 7],
        "image_audio_long": [2, "tiles", 3, "clip", 30],
        "switch_text": [SHORT_RANGE - 8],
        "switch_image_audio": [2, "tall", "clip", 23],
    }
    random = np.random.RandomState(11)
    described = {}
    for name, parts in cases.items():
        ids = []
        for part in parts:
            if isinstance(part, int):
                ids += random.randint(2, 490, part).tolist()
            elif part in pictures:
                ids += [IMAGE] * pictures[part]["tokens"]
            else:
                ids += [AUDIO] * audio_tokens(clips[part])
        described[name] = {
            "ids": ids,
            "images": [part for part in parts if part in pictures],
            "audios": [part for part in parts if part in clips],
        }
    return described


def case_inputs(case, pictures, clips):
    media = image_inputs([pictures[n] for n in case["images"]]) if case["images"] else {}
    return media | (audio_inputs([clips[n] for n in case["audios"]]) if case["audios"] else {})


def forward(model, case, ids, media, cache=None):
    Adapted.active = "vision" if case["images"] else "speech" if case["audios"] else None
    return model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=cache is not None, **media).logits[0]


def greedy(model, case, media, steps):
    """Returns the tokens; the cache is dropped when the sequence passes the short rope factors."""
    ids, cache = list(case["ids"]), None
    for _ in range(steps):
        if cache is not None and cache.get_seq_length() == SHORT_RANGE:
            cache = None
        if cache is None:
            cache = DynamicCache(config=model.config)
            logits = forward(model, case, ids, media, cache)
        else:
            logits = forward(model, case, ids[-1:], {}, cache)
        ids.append(int(logits[-1].argmax()))
        first, second = logits[-1].topk(2).values.tolist()
        assert first - second > 3e-3, "too close to tell in float32: choose another seed"
    return ids[len(case["ids"]) :]


# --- arrays --------------------------------------------------------------------------------------------------


def vision_arrays(model, pictures):
    embedder = model.model.embed_tokens_extend.image_embed
    crops, mask = pictures["bottom"]["crops"], pictures["bottom"]["mask"].bool()
    hidden = embedder.img_processor(crops, patch_attention_mask=mask, output_hidden_states=True).hidden_states
    arrays = {f"vision/bottom_hidden_{i}": h for i, h in enumerate(hidden[:-1])}
    for name, picture in pictures.items():
        ids = torch.full((1, picture["tokens"]), IMAGE)
        blank = torch.zeros(1, picture["tokens"], TEXT["hidden_size"])
        arrays[f"vision/{name}_tokens"] = embedder(ids, blank, **image_inputs([picture]))[0]
    return arrays


def audio_arrays(model, clips):
    embedder = model.model.embed_tokens_extend.audio_embed
    encoder = embedder.encoder
    projectors = {
        "speech": (embedder.up_proj_for_speech, embedder.down_proj_for_speech),
        "vision": (embedder.up_proj_for_vision_speech, embedder.down_proj_for_vision_speech),
    }
    # More than one window of 500 sub-frames; whole numbers, so that they are stored exactly.
    long = np.random.RandomState(5).randint(0, 16, (4010, 80)).astype(np.uint8)
    frames = torch.from_numpy(long).float()
    batches = {
        "clip": [clips["clip"]],
        "both": [clips["clip"], clips["short"]],
        "long": [frames],
        "long_both": [frames, frames[1000:1900]],
    }
    arrays = {"audio/long_features": torch.from_numpy(long)}
    for name, members in batches.items():
        inputs = audio_inputs(members)
        encoded = encoder(inputs["audio_input_features"], inputs.get("audio_attention_mask"))
        arrays[f"audio/{name}_encoded"] = encoded
        if name == "clip":
            arrays |= {f"audio/clip_hidden_{i}": h for i, h in enumerate(encoder.seen)}
        if not name.startswith("long"):
            for projector, (up, down) in projectors.items():
                arrays[f"audio/{name}_{projector}_tokens"] = down(functional.gelu(up(encoded)))
    return arrays


def rope_arrays(model):
    arrays = {}
    for regime, positions in {"short": torch.arange(12), "long": torch.tensor([0, 1, 5, 63, 64, 65, 400])}.items():
        cos, sin = model.model.rotary_emb(torch.zeros(1), positions[None])
        arrays |= {f"rope/{regime}_positions": positions, f"rope/{regime}_cos": cos[0], f"rope/{regime}_sin": sin[0]}
    return arrays


@torch.no_grad()
def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    model, adapters = build()
    write_checkpoints(model, adapters)
    attach(model, adapters)
    maybe_install_capturing_hooks(model.model)  # from the outermost model, before a part of it is called by itself
    pictures, clips = write_media()
    cases = prompts(pictures, clips)
    arrays = rope_arrays(model) | vision_arrays(model, pictures) | audio_arrays(model, clips)
    for name, case in cases.items():
        media = case_inputs(case, pictures, clips)
        arrays[f"logits/{name}"] = forward(model, case, case["ids"], media)
        arrays[f"tokens/{name}"] = np.array(greedy(model, case, media, 16), np.int32)
    np.savez_compressed(HERE / "model.npz", **{name: np.asarray(array) for name, array in arrays.items()})
    rows = (f' "{name}": {json.dumps(case)}' for name, case in cases.items())
    (HERE / "cases.json").write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
