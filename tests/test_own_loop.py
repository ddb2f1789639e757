"""`TrainLoader` and `EvalLoader`, the loader for a loop of one's own."""

import copy
import gc
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch
from launching import wait_for
from torch.utils.data import DataLoader

from pipeline import EvalLoader, TrainLoader
from pipeline.__main__ import main
from pipeline.config import AugmentConfig, DataConfig, TrainConfig, parse_config
from pipeline.dataset.index.index import index_folder
from pipeline.dataset.index.scan import build_index
from pipeline.errors import TransientError, UserError
from pipeline.loader.build import make_eval_stream, make_train_stream
from pipeline.loader.plan import make_train_plan
from pipeline.loader.stream import Stream
from pipeline.rank_info import RankInfo
from pipeline.training.optim.loss import ClassLoss
from pipeline.training.step import NormalizeEraseMix

SMALL = {"batch_size": 20, "image_size": 32, "seed": 3, "device": "cpu"}
FULL = AugmentConfig(policy="randaugment", jitter=(0.2, 0.2, 0.2, 0.1), random_erase=0.5, mixup=0.2, cutmix=1.0)


@pytest.fixture(scope="module")
def root(synthetic_root):
    """96 training images of 4 classes: epochs of 20 end inside a batch."""
    build_index(synthetic_root)
    return synthetic_root


def ranks(root, count, **options):
    return [TrainLoader(root, **(SMALL | options), rank=rank, world_size=count) for rank in range(count)]


def epochs(loaders, epoch):
    return [loader.epoch(epoch) for loader in loaders]


def assert_same(batch, parts):
    """A whole global batch, and the parts that the ranks have of it."""
    for whole, pieces in zip(batch, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(pieces), whole, rtol=0, atol=0)


def test_importing_the_package_imports_no_torch():
    code = (
        "import sys, pipeline; assert 'torch' not in sys.modules; pipeline.TrainLoader; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(ImportError):
        from pipeline import NoSuchName  # noqa: F401


def test_batches_are_what_the_trainer_trains_on(root, tmp_path, monkeypatch):
    """Bit for bit, images and targets, with every augmentation on and images that grow: read off the network's input
    and the loss's targets of a real run."""
    seen, forward, loss = [], NormalizeEraseMix.forward, ClassLoss.forward

    def record_forward(self, images, how=None, keys=None):
        if self.training:
            handle = self.model.register_forward_pre_hook(lambda module, inputs: seen.append([inputs[0].clone()]))
            try:
                return forward(self, images, how, keys)
            finally:
                handle.remove()
        return forward(self, images, how, keys)

    def record_targets(self, logits, targets):
        seen[-1].append(targets.clone())
        return loss(self, logits, targets)

    monkeypatch.setattr(NormalizeEraseMix, "forward", record_forward)
    monkeypatch.setattr(ClassLoss, "forward", record_targets)
    options = ["--train.micro_batch_size", "20", "--train.max_steps", "6", "--train.precision", "fp32"]
    options += ["--evaluation.recalibrate_batches", "0", "--ema.decay", "0", "--train.device", "cpu"]
    recipe = str(runs.TINY.with_name("everything.yaml"))
    runs.call(root, tmp_path / "run", *options, recipe=recipe)
    trained = seen[2:]  # the first two are blank: the warm-up
    assert len(trained) == 6
    config = parse_config(["--config", recipe, "--data.root", str(root), *options])
    loader = TrainLoader.from_config(config, device="cpu")
    sizes = set()
    for (images, targets), found in zip(trained, (*loader.epoch(0), *loader.epoch(1)), strict=False):
        assert torch.equal(images, found[0]) and torch.equal(targets, found[1])
        sizes.add(images.shape[-1])
    assert sizes == {32, 64} and targets.is_floating_point()
    assert [loader.digest(step) for step in range(6)] == [
        row["batch_digest"] for row in runs.rows(tmp_path / "run", "train")
    ]


def test_every_rank_count_gives_the_same_global_batches(root):
    (whole,) = ranks(root, 1, augment=FULL)
    for count in (2, 5):
        for batch, *parts in zip(whole.epoch(1), *epochs(ranks(root, count, augment=FULL), 1), strict=True):
            assert_same(batch, parts)
            assert len(parts[0][0]) == 20 // count


def test_resumes_inside_an_epoch_on_another_number_of_ranks(root, tmp_path):
    (undisturbed,) = ranks(root, 1, augment=FULL)
    expected = [batch for epoch in range(3) for batch in undisturbed.epoch(epoch)]
    first = ranks(root, 2, augment=FULL)
    seen = 0
    for parts in zip(*epochs(first, 0), strict=True):
        assert_same(expected[seen], parts)
        seen += 1
    for _, parts in zip(range(2), zip(*epochs(first, 1), strict=True), strict=False):
        assert_same(expected[seen], parts)
        seen += 1
    torch.save(first[1].state_dict(), tmp_path / "loader.pt")
    resumed = ranks(root, 5, augment=FULL)
    for loader in resumed:
        loader.load_state_dict(torch.load(tmp_path / "loader.pt", weights_only=True))
        assert (loader.step, loader.current_epoch) == (seen, 1)
    for epoch in range(3):  # the loop as it was: what was seen before is left out
        for parts in zip(*epochs(resumed, epoch), strict=True):
            assert_same(expected[seen], parts)
            seen += 1
    assert seen == len(expected)


def test_epochs_have_every_sample_once_and_iterations_follow_each_other(root):
    loader = TrainLoader(root, **SMALL, raw=True)
    counts = []
    for epoch in range(5):
        assert loader.current_epoch == epoch
        counts.append(len(loader))
        assert sum(len(targets) for _, targets in loader) == 20 * counts[-1]
    assert counts == [5, 5, 5, 5, 4] and loader.steps(5) == 24 and loader.num_samples == 96
    assert loader.current_epoch == 5
    targets = torch.cat([targets for epoch in range(5) for _, targets in loader.epoch(epoch)])
    assert torch.bincount(targets).tolist() == [120] * 4  # 5 epochs of 24 images a class


def test_set_epoch_and_a_loop_that_is_left(root):
    loader, other = (TrainLoader(root, **SMALL) for _ in range(2))
    loader.set_epoch(2)
    assert torch.equal(next(iter(loader))[0], next(other.epoch(2))[0])
    rest = [images for images, _ in loader]  # goes on after the batch that was taken
    assert len(rest) == 4
    for images, found in zip(list(other.epoch(2))[1:], rest, strict=True):
        assert torch.equal(images[0], found)
    other.load_state_dict({**loader.state_dict(), "step": 7})
    other.set_epoch(1)  # of a loop that calls it before every epoch: the rest of the resumed one
    assert len(list(other)) == 3
    other.set_epoch(2)
    assert len(list(other)) == 5


def test_an_augmentation_is_applied_or_refused(root):
    plain = next(TrainLoader(root, **SMALL).epoch(0))
    for options in (
        {"augment": "trivialaugment"},
        {"augment": AugmentConfig(jitter=(0.4, 0.4, 0.4, 0.1))},
        {"augment": AugmentConfig(random_erase=1.0)},
        {"mixup": 0.2},
        {"cutmix": 1.0},
    ):
        loader = TrainLoader(root, **SMALL, **options)
        images, targets = next(loader.epoch(0))
        assert images.shape == plain[0].shape and not torch.equal(images, plain[0]), options
        if loader.config.augment.mixes:
            assert targets.shape == (20, 4)
            torch.testing.assert_close(targets.sum(1), torch.ones(20))
        else:
            assert torch.equal(targets, plain[1])
        with pytest.raises(UserError, match="raw=True"):
            TrainLoader(root, **SMALL, **options, raw=True)


def test_raw_batches_are_normalized_to_the_others(root):
    data = DataConfig(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    (images, targets) = next(TrainLoader(root, **SMALL, data=data).epoch(0))
    (raw, labels) = next(TrainLoader(root, **SMALL, data=data, raw=True).epoch(0))
    assert raw.dtype == torch.uint8 and raw.shape == (20, 32, 32, 3) and torch.equal(labels, targets)
    mean, std = torch.tensor(data.mean), torch.tensor(data.std)
    torch.testing.assert_close(images.permute(0, 2, 3, 1), (raw / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_the_next_epoch_is_read_ahead(root, monkeypatch):
    """One stretch of reading over three epochs, a new one after a loop that was left, none beyond for validation."""
    begun = []
    real = Stream.batches
    monkeypatch.setattr(Stream, "batches", lambda self, *asked: begun.append(asked[:2]) or real(self, *asked))
    loader = TrainLoader(root, **SMALL)
    parts = [torch.cat([images for images, _ in loader.epoch(epoch)]) for epoch in range(3)]
    assert [start for start, _ in begun] == [0]
    for epoch, found in enumerate(parts):
        assert torch.equal(torch.cat([images for images, _ in TrainLoader(root, **SMALL).epoch(epoch)]), found)
    begun.clear()
    next(loader.epoch(3))
    assert len(list(loader.epoch(4))) == 4 and [start for start, _ in begun] == [20]
    begun.clear()
    images = EvalLoader(root, 20, 32)
    assert sum(len(batch) for batch, _ in images) == 24 and begun == [(0, 2)]


def test_one_iterator_at_a_time(root):
    loader = TrainLoader(root, **SMALL)
    first, second = loader.epoch(0), loader.epoch(0)
    next(first)
    assert torch.equal(next(second)[0], next(TrainLoader(root, **SMALL).epoch(0))[0])
    with pytest.raises(UserError, match="one at a time"):
        next(first)
    assert len(list(second)) == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, TransientError])
def test_after_ctrl_c_or_an_error_the_rest_of_the_epoch_is_read(root, error, monkeypatch):
    """The next loop was empty, without a word, and so were all that followed."""
    whole = [images for images, _ in TrainLoader(root, **SMALL).epoch(0)]
    loader, found, prepare, failures = TrainLoader(root, **SMALL), [], Stream._prepare, [error("now")]

    def fail_once(self, step):
        if step == 3 and failures:
            raise failures.pop()
        return prepare(self, step)

    monkeypatch.setattr(Stream, "_prepare", fail_once)
    with pytest.raises(error):
        found += (images for images, _ in loader)
    assert len(found) == loader.step < 5
    found += [images for images, _ in loader]
    assert torch.equal(torch.cat(found), torch.cat(whole))


def test_an_iterator_of_a_closed_loader_says_so(root):
    loader = TrainLoader(root, **SMALL)
    batches = loader.epoch(0)
    next(batches)
    loader.close()
    with pytest.raises(UserError, match="its loader was closed"):
        next(batches)


@pytest.mark.parametrize("kind", [TrainLoader, EvalLoader])
def test_a_loader_that_nobody_has_any_more_is_free(root, kind):
    """At once, also in the midst of an epoch: a loop that makes one for each epoch has the memory of one."""
    loader = kind(root, 12, 32, device="cpu")
    before = threading.active_count()
    gc.disable()
    try:
        list(loader)
        next(iter(loader))
        stream = loader._reader.stream
        parts = [weakref.ref(part) for part in (loader, stream, stream.decoder, stream.source)]
        del loader, stream
        wait_for(  # a thread ends what it is at
            lambda: not any(part() for part in parts) and threading.active_count() <= before,
            limit_s=20,
            say=lambda: f"alive: {[part() for part in parts]}, {threading.active_count()} threads, {before} before",
        )
    finally:
        gc.enable()


def test_a_loader_in_a_forked_process_says_that_its_threads_are_not_there(root):
    """It waited for them without end."""
    loader = TrainLoader(root, **SMALL)
    batches = iter(loader)
    next(batches)
    child = os.fork()
    if not child:
        signal.alarm(60)
        said = []
        for read in (lambda: next(batches), lambda: next(iter(loader))):
            try:
                read()
            except UserError as error:
                said.append("make a loader in each process" in str(error))
        os._exit(0 if said == [True, True] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert len(list(batches)) == 4


def test_torchs_dataloader_around_a_loader_is_named(root, monkeypatch):
    loader = TrainLoader(root, **SMALL)
    for options in ({}, {"batch_size": None}, {"shuffle": True}):
        with pytest.raises(UserError, match="loop over it as it is, without torch's DataLoader"):
            next(iter(DataLoader(loader, **options)))
    monkeypatch.setattr("torch.utils.data.get_worker_info", lambda: SimpleNamespace(num_workers=2))
    with pytest.raises(UserError, match=r"each of the 2 workers .* would read all batches"):
        next(iter(loader))


def test_a_validation_batch_of_which_nothing_can_be_read_is_left_out(root, tmp_path):
    own = shutil.copytree(root, tmp_path / "data")
    loader = EvalLoader(own, batch_size=1, image_size=32, device="cpu")
    loader.index.splits["val"].path(3).write_bytes(b"no image")
    with loader:
        assert sum(len(targets) for _, targets in loader) == loader.num_samples - 1 == 23


def test_an_unreadable_image_is_replaced_alike_everywhere(root, tmp_path):
    own = shutil.copytree(root, tmp_path / "data")
    whole = TrainLoader(own, **SMALL, raw=True)
    ids, *_ = whole.plan.samples_at(0, 0, 20)
    bad = whole.index.splits["train"].path(int(ids[13]))
    bad.write_bytes(b"no image")
    batch = next(whole.epoch(0))
    assert len(batch[0]) == 20 and list(whole.unreadable) == [whole.index.splits["train"].name(int(ids[13]))]
    assert_same(batch, [next(loader.epoch(0)) for loader in ranks(own, 2, raw=True)])


def test_the_index_is_built_at_the_first_use(root, tmp_path):
    own = shutil.copytree(root, tmp_path / "data", ignore=shutil.ignore_patterns("index"))
    loader = TrainLoader(own, **SMALL)
    assert not index_folder(own).exists()
    assert len(loader) == 5 and (index_folder(own) / "index.json").exists()
    assert loader.classes == sorted(loader.classes) and loader.num_classes == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"augment": "randomaugment"}, "augment is 'randomaugment': give one of none, randaugment,"),
        ({"mixup": -1.0}, "mixup is -1.0: give a number of 0 or more"),
        ({"batch_size": 0}, "batch_size is 0: give a number above 0"),
        ({"batch_size": "20"}, "batch_size is '20': give a whole number"),
        ({"seed": -1}, "seed is -1: give a whole number"),
        ({"world_size": 3, "rank": 0}, "batch_size 20 is not divisible by the 3 ranks"),
        ({"world_size": 4, "rank": 0, "mixup": 0.2}, "mix_group 2 does not divide the 5 images"),
        ({"world_size": 2, "rank": 2}, "rank is 2: give 0 to 1"),
        ({"rank": 1}, "rank and world_size belong together"),
        ({"device": "tpu"}, "device is tpu: give 'cuda'"),
        ({"data": DataConfig(loader="fast")}, "loader is 'fast': give one of auto, dali, reference"),
        ({"data": DataConfig(crop_area=(0.5, 0.1))}, "crop_area is"),
    ],
)
def test_impossible_arguments_are_named(root, options, said):
    with pytest.raises(UserError) as found:
        TrainLoader(root, **(SMALL | options))
    assert str(found.value).startswith(said) and "\n" not in str(found.value)


def test_what_is_missing_is_named(tmp_path, root):
    with pytest.raises(UserError, match="root is missing"):
        len(TrainLoader("", **SMALL))
    with pytest.raises(UserError, match="nowhere"):
        len(TrainLoader(tmp_path / "nowhere", **SMALL))
    with pytest.raises(UserError, match="num_classes is 3"):
        next(TrainLoader(root, **SMALL, mixup=0.2, num_classes=3).epoch(0))
    assert next(TrainLoader(root, **SMALL, mixup=0.2, num_classes=7).epoch(0))[1].shape == (20, 7)


def test_ranks_that_torch_distributed_does_not_know_are_refused(root, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="every rank would read all images"):
        TrainLoader(root, **SMALL)
    assert TrainLoader(root, **SMALL, rank=0, world_size=1).place.size == 1


def test_a_state_of_other_batches_is_refused(root, tmp_path):
    loader = TrainLoader(root, **SMALL)
    state = loader.state_dict()
    for options, said in (
        ({"seed": 4}, "seed is 3 in the state and 4 in this loader"),
        ({"batch_size": 24}, "batch_size is 20 in the state and 24 in this loader"),
        ({"augment": "autoaugment"}, "augment is 'none' in the state and 'autoaugment' in this loader"),
    ):
        with pytest.raises(UserError, match=said):
            TrainLoader(root, **(SMALL | options)).load_state_dict(state)
    TrainLoader(root, **SMALL, data=DataConfig(threads=1, prefetch=1)).load_state_dict(state)
    unknown = ("data.decode", "data.alternate_flips", "data.pad_crop")
    older = {**state, "settings": {name: value for name, value in state["settings"].items() if name not in unknown}}
    TrainLoader(root, **SMALL).load_state_dict(older)  # of a version that did not know these options yet
    with pytest.raises(UserError, match="pad_crop is None in the state and 2 in this loader"):
        TrainLoader(root, **SMALL, data=DataConfig(pad_crop=2)).load_state_dict(older)
    with pytest.raises(UserError, match="not a state of a TrainLoader"):
        loader.load_state_dict({"epoch": 3})
    with pytest.raises(UserError, match="not a state of a TrainLoader"):
        loader.load_state_dict(None)
    own = shutil.copytree(root, tmp_path / "data", ignore=shutil.ignore_patterns("index"))
    next((own / "ILSVRC/Data/CLS-LOC/train").glob("*/*")).unlink()
    with pytest.raises(UserError, match="the images are others"):
        TrainLoader(own, **SMALL).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image_size": 0}, "image_size is 0: give a number above 0"),
        ({"image_size": (32, 32)}, r"image_size is \(32, 32\): give a whole number or None"),
        ({"image_size": "32"}, "image_size is '32': give a whole number"),
        ({"mixup": "much"}, "mixup is 'much': give a number"),
        ({"augment": None}, "augment is None: give the name of a policy, such as 'none', or an AugmentConfig"),
        ({"data": {"threads": 1}}, r"data is \{'threads': 1\}: give a pipeline.config.DataConfig"),
        ({"data": DataConfig(mean=0.5)}, "mean is 0.5: give 3 numbers or None"),
        ({"data": DataConfig(loader="pil")}, "loader is 'pil': give one of auto, dali, reference"),
        ({"data": DataConfig(threads=True)}, "threads is True: give a whole number or None"),
        ({"rank": "0", "world_size": "2"}, "rank is '0': give a whole number"),
        ({"rank": 0, "world_size": 0}, "world_size is 0: give the number of processes"),
        ({"num_classes": "5"}, "num_classes is '5': give a whole number"),
        ({"device": ["cpu"]}, r"device is \['cpu'\]: give 'cuda'"),
    ],
)
def test_arguments_of_other_types_are_named(root, options, said):
    with pytest.raises(UserError, match=said):
        TrainLoader(root, **(SMALL | options))


def test_numbers_of_numpy_and_torch_are_numbers(root):
    """The state is one of plain numbers, which torch.load takes with weights_only=True."""
    plain = {"batch_size": 20, "image_size": 32, "seed": 3, "rank": 0, "world_size": 2, "num_classes": 5}
    given = {name: np.int64(value) for name, value in plain.items()} | {"batch_size": torch.tensor(20)}
    means, half = np.array([0.5, 0.25, 0.5]), np.float32(0.5)
    loader = TrainLoader(root, **given, mixup=half, data=DataConfig(mean=means, crop_area=[half, 1]), device="cpu")
    state = loader.state_dict()
    saved = io.BytesIO()
    torch.save(state, saved)
    saved.seek(0)
    assert torch.load(saved, weights_only=True) == state
    same = DataConfig(mean=(0.5, 0.25, 0.5), crop_area=(0.5, 1.0))
    TrainLoader(root, **plain, mixup=0.5, data=same, device="cpu").load_state_dict(state)
    loader.set_epoch(np.int64(2))
    assert loader.current_epoch == 2 and EvalLoader(root, np.int64(5), np.int64(32), device="cpu").local_batch_size == 5


@pytest.mark.parametrize("device", [0, "cuda:1"])
def test_a_numbered_gpu_that_is_not_there_is_named(root, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"device is {device}, and no CUDA device is visible"):
        TrainLoader(root, **(SMALL | {"device": device}))


def test_a_gpu_beyond_the_last_one_is_named(root, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert TrainLoader(root, **(SMALL | {"device": "cuda:1"})).device == torch.device("cuda", 1)
    with pytest.raises(UserError, match="device is cuda:2: the last GPU that is visible here is cuda:1"):
        TrainLoader(root, **(SMALL | {"device": "cuda:2"}))


def test_variables_of_a_launcher_that_are_no_numbers_are_named(root, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "")  # as a template leaves it
    assert TrainLoader(root, **SMALL).place.size == 1
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE=two in the environment is not a whole number"):
        TrainLoader(root, **SMALL)
    monkeypatch.setenv("LOCAL_RANK", "x")
    with pytest.raises(UserError, match="LOCAL_RANK=x in the environment is not a whole number"):
        TrainLoader(root, **SMALL, rank=0, world_size=2)


def test_an_epoch_that_is_no_number_and_a_state_that_is_cut_are_named(root):
    loader = TrainLoader(root, **SMALL)
    with pytest.raises(UserError, match="epoch is '1': give a whole number"):
        loader.epoch("1")
    with pytest.raises(UserError, match="epoch is None: give a whole number"):
        loader.set_epoch(None)
    for other in ({"step": -3}, {"step": None}):
        with pytest.raises(UserError, match="not a state of a TrainLoader"):
            loader.load_state_dict(loader.state_dict() | other)
    with pytest.raises(UserError, match="not a state of a TrainLoader"):
        loader.load_state_dict({name: loader.state_dict()[name] for name in ("format", "step")})


def test_a_second_thread_is_refused_in_one_line(root, monkeypatch):
    """It was a ValueError, "generator already executing"."""
    loader, said = TrainLoader(root, **SMALL), []

    def try_to(use):
        try:
            use()
        except ValueError as error:
            said.append(str(error))

    def batches_while_another_thread_uses_the_loader(*_):
        for use in (lambda: next(iter(loader)), loader.close):
            other = threading.Thread(target=try_to, args=[use])
            other.start()
            other.join()
        yield from ()

    monkeypatch.setattr(Stream, "batches", batches_while_another_thread_uses_the_loader)
    assert list(loader) == []
    assert said == ["another thread reads with this loader; read in one thread, or make a loader for each"] * 2


def test_torch_defaults_that_the_program_has_set_do_not_count(root):
    """torch.set_default_device("cuda") is usual; meta stands for it here."""
    loader = TrainLoader(root, **SMALL, augment="trivialaugment", mixup=0.2)
    images, targets = next(iter(loader))
    for default, before in ((torch.set_default_device, None), (torch.set_default_dtype, torch.float32)):
        default("meta" if before is None else torch.float64)
        try:
            found = next(iter(TrainLoader(root, **SMALL, augment="trivialaugment", mixup=0.2)))
        finally:
            default(before)
        torch.testing.assert_close(found, (images, targets), rtol=0, atol=0.02)  # one level of 255, by rounding


def test_the_sizes_of_an_eval_loader_are_named_as_its_arguments(root):
    with pytest.raises(UserError, match=r"^image_size is 0: give a number above 0"):
        EvalLoader(root, image_size=0)
    with pytest.raises(UserError, match=r"^resize is 16: give at least image_size"):
        EvalLoader(root, image_size=32, resize=16)


def test_a_loader_is_not_carried_into_another_process(root):
    """There it would read this rank's share of the images."""
    for loader in (TrainLoader(root, **SMALL), EvalLoader(root, image_size=32, device="cpu")):
        for take in (pickle.dumps, copy.deepcopy):
            with pytest.raises(UserError, match="make one in each process"):
                take(loader)


def test_more_images_in_a_batch_than_there_are_is_said(root, caplog):
    assert len(TrainLoader(root, **(SMALL | {"batch_size": 96}))) == 1 and not caplog.messages
    assert len(TrainLoader(root, **(SMALL | {"batch_size": 200}))) == 1
    assert caplog.messages == [
        "batch_size is 200, and the data set has 96 training images: each batch holds some of them more than once"
    ]


def test_an_eval_loader_is_read_by_one_loop_at_a_time(root):
    loader = EvalLoader(root, batch_size=20, image_size=32, device="cpu")
    with pytest.raises(UserError, match="another one of the same loader was begun"):
        for _ in loader:
            assert len(list(loader)) == 2


def test_validation_images_come_once_over_all_ranks(root):
    whole = EvalLoader(root, batch_size=7, image_size=32, resize=36, device="cpu")
    images, targets = (torch.cat(parts) for parts in zip(*whole, strict=True))
    assert len(images) == whole.num_samples == 24 and len(whole) == 4
    assert targets.tolist() == [label for label in range(4) for _ in range(6)]
    loaders = [
        EvalLoader(root, batch_size=7, image_size=32, resize=36, rank=rank, world_size=3, device="cpu")
        for rank in range(3)
    ]
    assert [len(list(loader)) for loader in loaders] == [len(loader) for loader in loaders]
    parts = [torch.cat([images for images, _ in loader]) for loader in loaders]
    assert torch.equal(torch.cat(parts), images)
    raw = next(iter(EvalLoader(root, image_size=32, resize=36, raw=True, device="cpu")))[0]
    assert raw.dtype == torch.uint8 and raw.shape == (24, 32, 32, 3)


def test_validation_needs_no_training_images(root, tmp_path):
    split = build_index(root).splits["val"]
    for sample, label in enumerate(split.records["label"].tolist()):
        folder = tmp_path / "photos" / f"class-{label}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(split.path(sample), folder)
    with EvalLoader(tmp_path / "photos", image_size=32, device="cpu") as loader:
        assert sum(len(targets) for _, targets in loader) == 24


def test_training_needs_no_validation_images(root, tmp_path, capsys):
    """The same batches; whatever needs both splits says what is missing, also by an index of one."""
    own = shutil.copytree(root, tmp_path / "data", ignore=shutil.ignore_patterns("val", "index", "*.csv"))
    loader, whole = TrainLoader(own, **SMALL), TrainLoader(root, **SMALL)
    assert_same(next(iter(whole)), [next(iter(loader))])
    assert list(loader.index.splits) == ["train"] and loader.digest(0) == whole.digest(0)
    for other in (EvalLoader(own, 20, 32), EvalLoader.from_config(loader.config)):
        with pytest.raises(UserError, match="neither val/ nor test/"):
            len(other)
    with pytest.raises(UserError, match="no validation images; give a data root with val/"):
        make_eval_stream(loader.index, loader.config.data, 4, loader.place)
    preflight = ["preflight", "--config", str(runs.TINY), "--data.root", str(own), "--run_dir", str(tmp_path / "run")]
    assert main([*preflight, "--train.device", "cpu"]) == 2
    assert f"{own} has no validation images" in capsys.readouterr().out
    shutil.rmtree(index_folder(own))
    assert main([*preflight, "--train.device", "cpu"]) == 2
    assert "neither val/ nor test/" in capsys.readouterr().out


def test_a_stream_says_whose_augmentation_it_does_not_apply(root):
    """A plan with an augmentation has other digests: nobody may read its batches without applying that."""
    data, augment = DataConfig(str(root), image_size=32).resolve(), AugmentConfig(policy="randaugment", mixup=0.2)
    index = build_index(root)
    plan = make_train_plan(index, data, TrainConfig(global_batch_size=8), augment)
    for applies in ({}, {"applies": AugmentConfig(policy="randaugment")}):
        with pytest.raises(UserError, match=r"the plan augments \(policy randaugment, mixup 0.2\).*TrainLoader"):
            make_train_stream(index, plan, data, RankInfo(), **applies)
    stream = make_train_stream(index, plan, data, RankInfo(), applies=augment)
    (batch,) = stream.batches(0, 1)
    stream.close()
    assert batch.pixel_ops is not None and batch.erase_mix is not None
    repeated = make_train_plan(index, data, TrainConfig(global_batch_size=8), AugmentConfig(repeats=2))
    make_train_stream(index, repeated, data, RankInfo()).close()  # the plan itself repeats
