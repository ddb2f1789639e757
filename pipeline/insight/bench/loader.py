"""`bench loader`: CPU time an image of this project's loader and of others', on the same images in the same minutes."""

from pathlib import Path

from pipeline.errors import UserError
from pipeline.insight.bench.arena import Contender, Outcome, compete, ratios
from pipeline.insight.bench.table import contest_table, ratio_line


def loader(
    data: str,
    shards: str | None = None,
    size: int = 224,
    batch_size: int = 64,
    images: int = 384,
    rounds: int = 7,
    threads: int | None = None,
    peers: bool = True,
    flat: int = 0,
    gpu: bool = False,
) -> dict:
    """CPU time an image of the loader, beside torchvision's, timm's and FFCV's.

    Args:
        data: a data root with an index and images in class folders.
        shards: a data root of shards with reduced images (pipeline pack --short_side 256), measured beside it.
        size: pixels of an image's side.
        batch_size: images a batch.
        images: images a round.
        rounds: rounds that count, after one that does not.
        threads: decoding threads, and others' worker processes; default: the cores.
        peers: false: this project's loader alone.
        gpu: also try the ways to decode for a GPU; a card's own decoder may crash, and that is said.
        flat: also read so many images in one go, and give the resident memory before and after.
    """
    from pipeline.insight.bench import gpu_decoders, loaders

    for root in filter(None, (data, shards)):
        if not (Path(root).expanduser() / "index" / "index.json").exists():
            raise UserError(f"{root} has no index; make one: pipeline index {root}")
    data = str(Path(data).expanduser())
    count = loaders.share_threads(threads)
    common = {"size": size, "batch": batch_size, "images": images}
    result: dict = {"data": Path(data).name, "threads": count, **common, "rounds": rounds, "contests": {}}

    def own(name: str, root: str, split: str, loader: str = "dali", windows_only: bool = False) -> Contender:
        more = {"threads": count, "loader": loader, "windows_only": windows_only}
        return Contender(name, loaders.ours, {"root": root, "split": split, **common, **more})

    def other(name: str, make, split: str, workers: int) -> Contender:
        return Contender(name, make, {"root": data, "split": split, **common, "workers": workers})

    def others(split: str) -> list[Contender]:
        if not peers:
            return []
        return [
            other("torchvision", loaders.torchvision_loader, split, count),
            other("timm", loaders.timm_loader, split, count),
            other("ffcv", loaders.ffcv_loader, split, count),
        ]

    train = [own("ours", data, "train"), own("windows only", data, "train", windows_only=True)]
    if shards:
        train.append(own("ours, shards", str(Path(shards).expanduser()), "train"))
    train.append(Contender("PIL decode alone", loaders.pil_decode, {"root": data, "images": images}))
    train += [own("ours, no DALI", data, "train", "reference"), *others("train")]
    validation = [own("ours", data, "val"), *others("val")]
    contests = {"training": train, "validation": validation}
    if gpu:
        common_gpu = {"root": data, **common, "threads": count}
        contests["decoding for a GPU"] = [
            Contender(way, gpu_decoders.decode_for_gpu, {**common_gpu, "way": way}, may_crash=True)
            for way in gpu_decoders.WAYS
        ]
    for name, contenders in contests.items():
        outcomes = compete(contenders, rounds, warm_up=3, about=f"bench loader, {name}")  # buffers grow at first
        result["contests"][name] = _tell(name, outcomes)
    if flat:
        result["memory"] = memory_over(data, size, batch_size, flat, count)
        print(f"\n{flat:,} images in one go: resident memory " + ", ".join(f"{mib:,.0f}" for mib in result["memory"]))
    return result


def _tell(name: str, outcomes: dict[str, Outcome]) -> dict:
    """Print a contest; its plain values."""
    for what, unit in (("cpu_ms", "CPU ms"), ("wall_ms", "ms")):
        print(f"\n{name}, {unit} an image (median of rounds, least and greatest)")
        print(contest_table(outcomes, what))
    pairs = [("ours", other) for other in outcomes if other != "ours"]
    pairs += [("ours, shards", other) for other in ("torchvision", "ffcv") if other in outcomes]
    pairs += [("windows only", "PIL decode alone")]
    told = {}
    for of, to in pairs:
        spread = ratios(outcomes, of, to) if of in outcomes and to in outcomes else None
        if spread is not None:
            told[f"{to} / {of}"] = spread.plain(3)
            print(ratio_line(to, of, spread))
    return {"outcomes": {key: outcome.plain() for key, outcome in outcomes.items()}, "ratios": told}


def memory_over(root: str, size: int, batch: int, images: int, threads: int) -> list[float]:
    """Resident memory, MiB, after each tenth of so many training images."""
    from pipeline.insight.bench.arena import rss_mib
    from pipeline.insight.bench.loaders import open_stream
    from pipeline.progress import Progress

    stream = open_stream(root, "train", size, batch, threads, "auto")
    steps = max(10, images // batch)
    seen = []
    with Progress("bench loader, memory", steps, "batches") as progress:
        for step, _ in enumerate(stream.batches(0, steps), 1):
            progress.advance(1)
            if step % (steps // 10) == 0:
                seen.append(round(rss_mib(), 1))
    stream.close()
    return seen
