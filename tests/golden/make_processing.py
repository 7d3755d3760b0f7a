"""Writes processing_images.npz, processing_plans.npz and processing_audio.npz beside this file.

The values come from a second, slow implementation of the preprocessing, one number at a time, straight from the
formulas: nothing of the package is imported. Needs numpy and scipy; takes seconds.

    python tests/golden/make_processing.py
"""

import math
from pathlib import Path

import numpy as np
from scipy import signal

HERE = Path(__file__).parent
SIDE, PATCH, MAX_CROPS = 56, 14, 6


# --- images --------------------------------------------------------------------------------------------------


def grid(width, height, side, max_crops):
    columns, rows = math.ceil(width / side), math.ceil(height / side)
    if columns * rows <= max_crops:
        return columns, rows
    best, nearest = None, math.inf
    for product in range(1, max_crops + 1):
        for i in range(1, product + 1):
            if product % i:
                continue
            j = product // i
            d = abs(width / height - i / j)
            if d < nearest:
                best, nearest = (i, j), d
            elif d == nearest and width * height > 0.5 * side**2 * i * j:
                best = (i, j)
    return best


def plan(width, height, side, patch, max_crops):
    """Returns columns, rows, new width, new height, masked patch columns, masked patch rows, tokens."""
    columns, rows = grid(width, height, side, max_crops)
    target_width, target_height = columns * side, rows * side
    rx, ry = target_width / width, target_height / height
    if rx < ry:
        new_width, new_height = target_width, int(height * rx)
    else:
        new_width, new_height = int(width * ry), target_height
    masked_columns = (target_width - new_width) // patch
    masked_rows = (target_height - new_height) // patch
    per_side = side // patch
    visible = [
        [
            r < rows * per_side - masked_rows and c < columns * per_side - masked_columns
            for c in range(columns * per_side)
        ]
        for r in range(rows * per_side)
    ]
    pooled = [row[0::2] for row in visible[0::2]]
    half = per_side // 2
    tokens = sum(map(sum, pooled)) + sum(row[0] for row in pooled) + 1 + half * half + half
    return columns, rows, new_width, new_height, masked_columns, masked_rows, tokens


def bilinear_line(line, new):
    """Pillow's fixed-point bilinear resampling of one line of integers."""
    old = len(line)
    if old == new:
        return list(line)
    scale = old / new
    support = max(scale, 1.0)
    out = []
    for i in range(new):
        centre = (i + 0.5) * scale
        low, high = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), old)
        weights = [max(0.0, 1.0 - abs((x - centre + 0.5) / support)) for x in range(low, high)]
        total = sum(weights)
        fixed = [int(w / total * (1 << 22) + 0.5) for w in weights]
        value = (1 << 21) + sum(f * int(line[low + k]) for k, f in enumerate(fixed))
        out.append(min(max(value >> 22, 0), 255))
    return out


def bilinear(image, new_width, new_height):
    height, width, channels = image.shape
    wide = np.zeros((height, new_width, channels), np.uint8)
    for y in range(height):
        for c in range(channels):
            wide[y, :, c] = bilinear_line(image[y, :, c], new_width)
    out = np.zeros((new_height, new_width, channels), np.uint8)
    for x in range(new_width):
        for c in range(channels):
            out[:, x, c] = bilinear_line(wide[:, x, c], new_height)
    return out


def cubic(t):
    t, a = abs(t), -0.75
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def bicubic(image, side):
    """[H, W, C] to [C, side, side], every output from its 4 x 4 neighbours."""
    height, width, channels = image.shape
    out = np.zeros((channels, side, side))
    for i in range(side):
        y = (i + 0.5) * height / side - 0.5
        for j in range(side):
            x = (j + 0.5) * width / side - 0.5
            for v in range(math.floor(y) - 1, math.floor(y) + 3):
                for u in range(math.floor(x) - 1, math.floor(x) + 3):
                    pixel = image[min(max(v, 0), height - 1), min(max(u, 0), width - 1)]
                    out[:, i, j] += cubic(y - v) * cubic(x - u) * pixel
    return out


def layout(columns, rows, masked_columns, masked_rows, per_side):
    """The tokens' sources, walking over the pooled grid as a reader would."""
    half = per_side // 2
    entries = []
    for row in range(rows * half):
        if 2 * row >= rows * per_side - masked_rows:
            continue
        for column in range(columns * half):
            if 2 * column >= columns * per_side - masked_columns:
                continue
            crop = 1 + (row // half) * columns + column // half
            entries.append(crop * half * half + (row % half) * half + column % half)
        entries.append(-1)
    entries.append(-2)
    for row in range(half):
        entries += [row * half + column for column in range(half)]
        entries.append(-1)
    return entries


def picture(width, height, seed):
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([x * 255 / width, y * 255 / height, 127 + 120 * np.sin((x + 2 * y) / (5 + seed))], -1)
    image = waves.astype(np.uint8)
    for _ in range(6):
        top, left = random.integers(0, height), random.integers(0, width)
        image[top : top + random.integers(2, 30), left : left + random.integers(2, 30)] = random.integers(0, 256, 3)
    return image


def write_images():
    arrays = {}
    for name, (width, height) in {"enlarged": (61, 40), "reduced": (150, 230), "tall": (30, 140)}.items():
        image = picture(width, height, len(name))
        columns, rows, new_width, new_height, masked_columns, masked_rows, _ = plan(
            width, height, SIDE, PATCH, MAX_CROPS
        )
        padded = np.full((rows * SIDE, columns * SIDE, 3), 255, np.uint8)
        padded[:new_height, :new_width] = bilinear(image, new_width, new_height)
        per_side = SIDE // PATCH
        mask = np.zeros((1 + rows * columns, per_side, per_side), bool)
        mask[0] = True
        for row in range(rows * per_side - masked_rows):
            for column in range(columns * per_side - masked_columns):
                crop = 1 + (row // per_side) * columns + column // per_side
                mask[crop, row % per_side, column % per_side] = True
        arrays |= {
            f"{name}_image": image,
            f"{name}_padded": padded,
            f"{name}_global": bicubic((padded / 255 - 0.5) / 0.5, SIDE).astype(np.float32),
            f"{name}_mask": mask,
            f"{name}_layout": np.array(layout(columns, rows, masked_columns, masked_rows, per_side), np.int32),
        }
    np.savez_compressed(HERE / "processing_images.npz", **arrays)


def write_plans():
    random = np.random.default_rng(0)
    sizes = [(1, 1), (448, 448), (449, 448), (4032, 3024), (3024, 4032), (6000, 400), (2688, 2688), (2689, 2688)]
    sizes += [(8000, 8000), (10000, 10000), (1344, 5376), (640, 480), (1920, 1080), (14, 25), (5000, 100)]
    sizes += [tuple(int(v) for v in np.exp(random.uniform(np.log(20), np.log(6000), 2))) for _ in range(150)]
    plans = [plan(w, h, 448, 14, 36) for w, h in sizes]
    usable = [min(p[2], p[3]) >= 10 for p in plans]
    np.savez_compressed(
        HERE / "processing_plans.npz",
        sizes=np.array(sizes, np.int32)[usable],
        plans=np.array(plans, np.int32)[usable],
    )


# --- audio ---------------------------------------------------------------------------------------------------


def mel_weight(k, m):
    if not 1 <= k <= 245:
        return 0.0
    spacing = 1127 * math.log(1 + 7690 / 700) / 81
    mel = 1127 * math.log(1 + k * 31.25 / 700)
    left, centre, right = m * spacing, (m + 1) * spacing, (m + 2) * spacing
    return 1 - abs(centre - mel) / spacing if left < mel < right else 0.0


def log_mel(samples, rate):
    window, hop, size = (200, 80, 256) if rate == 8000 else (400, 160, 512)
    bins = range(size // 2 if rate == 8000 else size // 2 + 1)
    angles = 2 * np.pi * np.outer(list(bins), np.arange(window)) / size
    weights = [[mel_weight(k, m) for m in range(80)] for k in bins]
    taper = [0.54 - 0.46 * math.cos(2 * math.pi * t / (window - 1)) for t in range(window)]
    out = []
    for start in range(0, len(samples) - window + 1, hop):
        x = samples[start : start + window]
        y = np.array([(x[t] - 0.97 * x[max(t - 1, 0)]) * 32768 * taper[t] for t in range(window)])
        power = (np.cos(angles) @ y) ** 2 + (np.sin(angles) @ y) ** 2
        out.append([math.log(max(sum(p * w[m] for p, w in zip(power, weights, strict=True)), 1.0)) for m in range(80)])
    return np.array(out, np.float32)


def wave(seconds, rate, seed):
    random, t = np.random.default_rng(seed), np.arange(int(seconds * rate)) / rate
    tone = 0.3 * np.sin(2 * np.pi * 220 * t) + 0.2 * np.sin(2 * np.pi * (700 + 900 * t) * t)
    return np.round((tone + 0.02 * random.standard_normal(len(t))) * 32767).astype(np.int16)


def write_audio():
    arrays = {}
    for rate in (8000, 16000, 48000):
        samples = wave(0.15, rate, rate)
        floats = samples / 32768
        resampled = signal.resample_poly(floats, 1, rate // 16000) if rate > 16000 else floats
        arrays |= {f"samples_{rate}": samples, f"log_mel_{rate}": log_mel(resampled, min(rate, 16000))}
    np.savez_compressed(HERE / "processing_audio.npz", **arrays)


if __name__ == "__main__":
    write_images()
    write_plans()
    write_audio()
