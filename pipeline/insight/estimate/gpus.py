"""What GPUs can do at best, from their makers' data sheets: dense, without sparsity."""

from dataclasses import dataclass

from pipeline.errors import UserError


@dataclass(frozen=True)
class Card:
    """memory_mib: as nvidia-smi shows it. tflops: fp32 as torch runs convolutions (TF32 where the card has it);
    half_tflops: bf16 or fp16 in tensor cores. gb_s: memory bandwidth, 1e9 bytes a second."""

    memory_mib: int
    tflops: float
    half_tflops: float
    gb_s: float


CARDS = {
    "t4": Card(15_360, 8.1, 65.0, 320.0),
    "v100-16gb": Card(16_384, 15.7, 125.0, 900.0),
    "v100-32gb": Card(32_768, 15.7, 125.0, 900.0),
    "rtx3090": Card(24_576, 35.6, 71.0, 936.0),
    "rtx4090": Card(24_564, 82.6, 165.2, 1008.0),
    "rtx5090": Card(32_607, 104.8, 209.5, 1792.0),
    "l4": Card(23_034, 60.5, 121.0, 300.0),
    "a10": Card(23_028, 62.5, 125.0, 600.0),
    "a6000": Card(49_140, 77.4, 154.8, 768.0),
    "l40s": Card(46_068, 183.0, 362.0, 864.0),
    "rtx6000-ada": Card(49_140, 182.1, 364.2, 960.0),
    "a100-40gb": Card(40_960, 156.0, 312.0, 1555.0),
    "a100-80gb": Card(81_920, 156.0, 312.0, 2039.0),
    "h100": Card(81_559, 494.7, 989.4, 3350.0),
    "h200": Card(143_771, 494.7, 989.4, 4800.0),
    "b200": Card(183_359, 1125.0, 2250.0, 8000.0),
}
#: cards that are left out on purpose, and why
LEFT_OUT = {
    "mi300x": "an AMD card: DALI and NCCL, and so this pipeline, require NVIDIA's CUDA",
}


def find_card(name: str) -> Card:
    """Raises UserError for a card that is not listed."""
    key = name.lower().removeprefix("nvidia").removeprefix("amd instinct").strip().replace("_", "-").replace(" ", "-")
    plain = key.replace("-", "")
    fitting = [card for card in CARDS if card.replace("-", "") in (plain, plain.removeprefix("rtx"))]
    key = fitting[0] if fitting else key
    if key in LEFT_OUT:
        raise UserError(f"--card {name} is {LEFT_OUT[key]}; one of: {', '.join(CARDS)}")
    if key not in CARDS:
        sizes = [card for card in CARDS if card.startswith(f"{key}-")]
        raise UserError(f"--card {name} is not known; one of: {', '.join(sizes or CARDS)}")
    return CARDS[key]
