"""The page of a run: what it shows, that it opens in a browser alone, and that no run fails for it."""

import base64
import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
import torchvision
from PIL import Image
from torch import nn

from pipeline.__main__ import main
from pipeline.config import RawConfig, parse_config, to_yaml
from pipeline.insight.report.charts import WIDTH, Series, _label, line_chart, thin, ticks
from pipeline.insight.report.cli import charts
from pipeline.insight.report.colormap import inferno
from pipeline.insight.report.filters import before_after, grad_cam, picture_first
from pipeline.insight.report.page import STYLE
from pipeline.insight.report.predictions import Predictions, spread
from pipeline.insight.report.run_record import Record
from pipeline.insight.runs import distinct_names
from pipeline.tracking.eval_rows import better_scores

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = '<script>alert("x")</script><img src=http://example.com/x.png>'


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """A run whose training wrote the report by itself, with a hostile recipe text."""
    run = tmp_path_factory.mktemp("report") / "run"
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe.write_text(runs.TINY.read_text() + "\n")
    text = json.dumps({"what": HOSTILE, "source": "tests"})
    options = ["--about", text, "--tracking.report", "true", "--tracking.wandb", "offline"]
    output = runs.train(
        root, run, *options, "--train.max_steps", "6", "--train.eval_every_epochs", "0.5", recipe=str(recipe)
    )
    assert f"report {run}/report/index.html" in output
    return run


@pytest.fixture
def html(finished) -> str:
    return (finished / "report" / "index.html").read_text()


def test_it_shows_the_run(finished, html):
    best = max(row["val_top1"] for row in runs.rows(finished, "eval"))
    assert f"{best:.2f} %" in html
    for words in ("Loss against epochs", "Loss against minutes", "Accuracy against minutes", "Learning rate", "Speed"):
        assert words in html
    assert "11,178,564 parameters in 62 tensors" in html  # ResNet-18 for 4 classes
    assert html.count("<polyline") >= 8
    assert "Accuracy of each class" in html and "24 of 24 validation images" in html
    assert "Started 1 time." in html and "CPU," in html and "optim.lr" in html
    assert html.count("data:image/png") == 6  # two convolutions before, after, and their difference
    assert "<h2>Grad-CAM</h2>" in html and html.count("data:image/jpeg") >= 8


def test_it_is_self_contained_and_data_is_escaped(html):
    assert HOSTILE not in html and "&lt;script&gt;" in html
    assert "@import" not in html and "url(" not in html
    tags = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append((tag, dict(attributes)))

    Tags().feed(html)
    assert not {"script", "iframe", "object", "embed"} & {tag for tag, _ in tags}
    places = [attributes[key] for _, attributes in tags for key in ("src", "href", "srcset") if key in attributes]
    assert len(places) > 10 and {place for place in places if not place.startswith("data:")} == {"../metrics.jsonl"}


def test_values_are_shown_under_the_pointer(finished, html):
    """Every step of a short run has a place, with the ledger's values, and no script shows it."""
    loss = html.partition("<figcaption>Loss against epochs")[2].partition("</figure>")[0]
    tips = re.findall(r'<g class="at"><rect [^>]*/><g class="tip">(.*?)</g></g>', loss)
    rows, evals = runs.rows(finished, "train"), runs.rows(finished, "eval")
    assert len(tips) == len(rows) == 6
    for tip, row in zip(tips, rows, strict=True):
        assert f"epochs {row['epoch']:.4g}<" in tip and f"training {row['loss']:.4g}<" in tip
    assert f"validation {evals[-1]['val_loss']:.4g}<" in tips[-1]
    assert f"(at {evals[0]['epoch']:.4g})<" in tips[0]
    assert ".at:hover .tip { visibility: visible; }" in html


@pytest.mark.parametrize(("epochs", "steps_an_epoch"), [(600, 10), (1, 1251)])
def test_charts_of_600_epochs_and_of_40_steps(tmp_path, epochs, steps_an_epoch):
    """A long run's evaluations are drawn as they are; a run that is short of an epoch is drawn against its steps."""
    steps = 40 if epochs == 1 else 6000
    lines = [{"kind": "event", "event": "started", "step": 0, "last_step": steps}]
    for step in range(1, steps + 1):
        epoch = step / steps_an_epoch
        lines.append(
            {"kind": "train", "step": step, "epoch": epoch, "loss": 1 / step, "top1": 50.0, "images_per_s": 9.0}
        )
        if step % 10 == 0:
            scores = {"val_loss": 1 / step, "val_top1": 70 * step / steps, "val_top5": 90.0, "images": 50000}
            lines.append({"kind": "eval", "step": step, "epoch": epoch, **scores})
    (tmp_path / "config.yaml").write_text(to_yaml(parse_config(["--config", str(runs.TINY)])))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", str(tmp_path), "--device", "cpu"]) == 0
    html = (tmp_path / "report" / "index.html").read_text()
    against = "epochs" if epochs > 1 else "steps"
    chart = html.partition(f"<figcaption>Accuracy against {against}")[2].partition("</figure>")[0]
    (drawn,) = re.findall(r'class="line c1" points="([^"]*)"', chart)
    assert len(drawn.split()) == steps // 10
    assert chart.count('class="at"') == min(50, 200 if epochs > 1 else 40)
    first = html.index('<ul class="facts">')
    assert html.index("<h1>") < first < html.index("top-1, best") < html.index(">state") < html.index("last evaluation")
    assert html.index("last evaluation") < html.index("<h2>Training") and f"All {steps // 10:,} evaluations" in html
    assert len(html) < 600_000


def test_the_kernels_before_training_are_the_seeds(finished, html):
    """Drawn again from the seed alone, and they are not the trained ones."""
    from pipeline.insight.report.run_record import load_networks, read_record

    record = read_record(str(finished))
    networks = load_networks(record)
    torch.manual_seed(record.config.train.seed)
    from pipeline.model.build import build_model

    fresh = build_model(record.config.model, 4)
    assert torch.equal(networks.before.conv1.weight, fresh.conv1.weight)
    trained = torch.load(runs.checkpoint_at(finished, networks.step) / "model.pt", weights_only=True)
    assert torch.equal(networks.after.conv1.weight, trained["conv1.weight"])
    first = Image.open(BytesIO(base64.b64decode(re.search(r"data:image/png;base64,([^\"]+)", html)[1])))
    low = min(networks.before.conv1.weight.min(), networks.after.conv1.weight.min()).item()
    high = max(networks.before.conv1.weight.max(), networks.after.conv1.weight.max()).item()
    expected = picture_first(networks.before.conv1.weight.detach().numpy(), low, high)
    assert np.array_equal(np.asarray(first), expected)


def test_more_outputs_than_classes_and_weights_from_a_file_that_is_gone(root, tmp_path):
    """The guesses may be outputs that no class has; without the initial weights there is still the rest of the page."""
    weights = tmp_path / "weights.pth"
    torch.save(torchvision.models.resnet18(num_classes=9).state_dict(), weights)
    options = ["--model.num_classes", "9", "--model.weights", str(weights), "--train.max_steps", "1"]
    runs.call(root, tmp_path / "run", *options, "--ema.decay", "0.5")
    weights.unlink()
    assert main(["report", str(tmp_path / "run")]) == 0
    html = (tmp_path / "run/report/index.html").read_text()
    assert "initial weights can&#x27;t be made again" in html and "Accuracy of each class" in html
    better = better_scores(runs.rows(tmp_path / "run", "eval")[-1])
    assert f"{better['top1']:.2f} %" in html and ("averaged weights" in html) == better["averaged"]


def test_the_better_network_of_an_evaluation_has_all_its_own_scores():
    row = {"step": 1, "val_loss": 2.0, "val_top1": 20.0, "val_top5": 60.0}
    assert better_scores(row) == {"averaged": False, "loss": 2.0, "top1": 20.0, "top5": 60.0}
    row |= {"val_ema_loss": 1.0, "val_ema_top1": 45.0, "val_ema_top5": 95.0}
    assert better_scores(row) == {"averaged": True, "loss": 1.0, "top1": 45.0, "top5": 95.0}


def test_runs_of_one_name_are_told_apart_by_their_folders():
    assert distinct_names([Path("/a/x"), Path("/b/x")]) == ["a/x", "b/x"]
    assert distinct_names([Path("/a/x"), Path("/a/y")]) == ["x", "y"]


@pytest.mark.parametrize(
    ("value", "label"), [(0.000025, "2.5e-5"), (5e-5, "5e-5"), (1.5e10, "1.5e10"), (0.25, "0.25"), (0, "0")]
)
def test_axis_labels_are_the_values(value, label):
    assert _label(value) == label


def test_a_vision_transformers_patches_do_not_fill_the_page():
    patches = [torch.nn.Conv2d(3, 768, 32) for _ in range(2)]
    ((caption, pictures),) = before_after(*map(torch.nn.Sequential, patches))
    assert "768 kernels, the first 96 shown, 32x32" in caption
    assert max(side for picture in pictures.values() for side in picture.shape) < 1000


def test_the_pictures_go_to_wandb(finished):
    sent = {path.name for path in (finished / "wandb").glob("offline-run-*/files/media/images/report/*.png")}
    assert any(name.startswith("convolution-1-before") for name in sent) and any("grad-cam" in name for name in sent)


def test_a_page_replaces_nothing_but_a_page(finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    assert main(["report", str(finished), "--out", str(finished / "metrics.jsonl")]) == 2
    assert ".html" in capsys.readouterr().err and (finished / "metrics.jsonl").read_bytes() == before


def test_several_runs_are_compared(finished, root, tmp_path, capsys):
    other = tmp_path / "other"
    runs.call(root, other, "--train.max_steps", "3", "--optim.lr", "0.01", "--tracking.report", "false")
    assert main(["report", str(finished), str(other), "--out", str(tmp_path / "both.html")]) == 0
    html = (tmp_path / "both.html").read_text()
    assert html.index("Settings that differ") < html.index("<h2>Results") < html.index("<svg")
    assert "<td>optim.lr</td><td>0.05</td><td>0.01</td>" in html
    assert "run: training" in html and "other: validation" in html
    places = re.findall(r'<a href="([^"]*)">metrics.jsonl', html)
    assert [(tmp_path / place).resolve() for place in places] == [
        run.resolve() / "metrics.jsonl" for run in (finished, other)
    ]


def test_while_it_runs_and_without_the_data(finished, tmp_path, capsys):
    """A run before its first checkpoint has a page, too; what can't be shown is said."""
    run = tmp_path / "young"
    run.mkdir()
    shutil.copy(finished / "config.yaml", run)
    assert main(["report", str(run)]) == 0
    html = (run / "report" / "index.html").read_text()
    assert "nothing recorded yet" in html and "Not shown: " in html and "Not started yet." in html
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][:20])  # a row is being written
    assert main(["report", str(run), "--data_root", str(tmp_path)]) == 0
    assert "<polyline" in (run / "report" / "index.html").read_text()


def test_a_report_that_fails_does_not_fail_the_run(root, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "report").write_text("a file in the way")
    output = runs.call(root, run, "--tracking.report", "true", "--train.max_steps", "2")
    said = [line for line in output.splitlines() if "no report" in line]
    assert len(said) == 1 and "can't be written" in said[0] and "Traceback" not in output
    assert (run / "finished").exists()


def test_bad_options_are_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def browse(html: str, folder, width: int = 1280) -> tuple[str, str]:
    """(console messages, what the page came to) in a headless browser with a fresh profile."""
    page = folder / "page.html"
    page.write_text(html)
    quiet = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *quiet, "--disable-sync"]
    command += [
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},900",
        "--enable-logging=stderr",
        "--v=0",
    ]
    done = subprocess.run(
        [*command, "--dump-dom", f"file://{page}"], capture_output=True, text=True, timeout=180, check=True
    )
    return "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line), done.stdout


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (scripts/install_test_tools.sh)")
def test_a_browser_has_nothing_to_complain_about(html, tmp_path):
    messages, dom = browse(html, tmp_path)
    assert messages == ""
    assert "Most confused" in dom or "Accuracy of each class" in dom
    reaching_out = html.replace("</body>", '<img src="http://127.0.0.1:9/x.png"><script>1</script></body>')
    messages, _ = browse(reaching_out, tmp_path)  # the page's own policy forbids what leaves it, and says so
    assert "127.0.0.1:9/x.png" in messages and "script" in messages


def test_ticks_are_round_and_inside():
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(0, 97) == pytest.approx([0, 20, 40, 60, 80])
    assert ticks(0.013, 0.05) == pytest.approx([0.02, 0.03, 0.04, 0.05])


def test_charts_leave_out_what_is_no_number_and_keep_the_mean():
    xs, ys = thin(list(range(1000)), [1.0, 3.0] * 500)
    assert len(xs) <= 200 and sum(ys) / len(ys) == pytest.approx(2.0)
    assert thin([1, 2, 3], [1.0, float("nan"), float("inf")]) == ([1], [1.0])
    assert "nothing recorded yet" in line_chart("t", [Series("a", [], [], 0)], "x", "y")
    assert "&lt;b&gt;" in line_chart(
        "<b>", [Series("<b>", [0, 1], [1, 2], 0), Series("c", [0, 1], [1, 2], 1)], "x", "y"
    )


def test_a_spike_does_not_flatten_a_chart():
    """One loss of 1e9 made a line along the axis of all others."""
    losses = [7.0 - step / 20 for step in range(100)]
    spiked = [*losses[:50], 1e9, *losses[51:]]
    plain, chart = (line_chart("loss", [Series("a", list(range(100)), ys, 0)], "x", "y") for ys in (losses, spiked))

    def heights(text):
        return [float(point.split(",")[1]) for point in re.search(r'points="([^"]+)"', text)[1].split()]

    there = heights(chart)
    assert min(there) >= 0 and there[50] < 20  # at the upper edge
    assert there[:50] + there[51:] == pytest.approx(heights(plain)[:50] + heights(plain)[51:], abs=0.1)
    assert "values up to 1e9 are above the chart" in chart and "above the chart" not in plain
    long = [*losses * 10, 1e9, *losses * 10]  # drawn as averages
    assert "values up to 1e9 are above the chart" in line_chart(
        "l", [Series("a", list(range(2001)), long, 0)], "x", "y"
    )
    early = line_chart("loss", [Series("a", [1, 2, 3], [9.8e6, 0.7, 0.6], 0, exact=True)], "x", "y", note="2 NaN")
    assert "2 NaN; values up to 9.8e6 are above the chart" in early
    for usual in ([7.0, 0.8, 0.1], [0.0, 0.1, 75.0], [0.0, 0.3, 0.0], [-3.0, -2.0], [0.7, 0.7, 1e9], [1e9]):
        assert "above the chart" not in line_chart("t", [Series("a", [1, 2, 3][: len(usual)], usual, 0)], "x", "y")


def test_a_chart_reaches_to_the_end_where_values_are_nan_and_says_so():
    """A loss that became NaN: the curve ended at the right edge, as one of a run that is at that step."""
    rows = [{"kind": "train", "step": s, "epoch": 1.0 * s, "loss": 2.0 if s <= 50 else "nan"} for s in range(1, 101)]
    record = Record(None, RawConfig().resolve(), rows, [], [], [s / 100 for s in range(1, 101)], "a")
    loss = charts([record]).split("<figure>")[1]
    assert "50 values NaN or infinite, not drawn" in loss
    assert max(float(point.split(",")[0]) for point in re.search(r'points="([^"]+)"', loss)[1].split()) < WIDTH * 0.6
    never = dataclasses.replace(record, train=[row | {"loss": "nan"} for row in rows])
    assert "100 values NaN" in charts([never]).split("<figure>")[1]
    assert "nothing recorded yet" not in charts([never]).split("<figure>")[1]


def test_24_runs_have_lines_of_their_own():
    rows = [{"kind": "train", "step": s, "epoch": 1.0 * s, "loss": 2.0, "lr": 0.1} for s in (1, 2)]
    record = Record(None, RawConfig().resolve(), rows, [], [], [0.5, 1.0], "a")
    page_of_24 = charts([dataclasses.replace(record, name=str(number)) for number in range(24)])
    rate = page_of_24.split("<figcaption>Learning rate")[1].split("</figure>")[0]
    for kinds in (re.findall(r'<polyline class="([^"]+)"', rate), re.findall(r'<li class="([^"]+)"', rate)):
        assert len(kinds) == len(set(kinds)) == 24
    assert all(f".line.{kind} " in STYLE and f".legend .{kind} " in STYLE for kind in ("dashed", "dotted", "mixed"))


def test_confusions_and_mistakes():
    labels, guesses = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0, 2])
    said = Predictions(np.arange(6), labels, guesses, np.array([0.9, 0.6, 0.8, 0.9, 0.7, 0.5]), 0, 6)
    assert said.top1 == 50 and said.confusions(5) == [(0, 1, 2), (1, 0, 1)]
    assert said.mistakes(2).tolist() == [2, 4]
    share, count = said.by_class(3)
    assert share.tolist() == pytest.approx([100 / 3, 50, 100]) and count.tolist() == [3, 2, 1]
    assert spread(10, 3).tolist() == [0, 4, 9] and len(spread(10, None)) == 10


def test_grad_cam_finds_the_spot():
    """A network that answers 'class 1' for what is bright in one corner looks there."""

    class Corner(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 1, 1, bias=False), nn.Linear(1, 2, bias=False)
            nn.init.constant_(self.conv.weight, 1.0)
            self.head.weight = nn.Parameter(torch.tensor([[0.0], [1.0]]))

        def forward(self, images):
            return self.head(self.conv(images.permute(0, 3, 1, 2).float()).mean((2, 3)))

    images = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    images[0, 6, 1] = 255
    heat = grad_cam(Corner(), images, torch.tensor([1]))
    assert heat.shape == (1, 8, 8) and np.unravel_index(heat[0].argmax(), (8, 8)) == (6, 1)
    assert heat.sum() == pytest.approx(1.0)


def test_the_color_map_is_from_dark_to_bright():
    colors = inferno(np.array([[-1.0, 0.0, 0.5, 1.0, 2.0]]))
    assert colors.shape == (1, 5, 3)
    assert colors[0, 0].tolist() == colors[0, 1].tolist() == [0, 0, 4]  # the ends of matplotlib's table
    assert colors[0, 3].tolist() == colors[0, 4].tolist() == [252, 255, 164]
    assert np.allclose(colors[0, 2], [187, 55, 84], atol=2)  # its middle
    brightness = inferno(np.linspace(0, 1, 256)) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(brightness) > 0).all()
