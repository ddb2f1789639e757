"""The model of scaling: its parts by hand, and how near it comes to what was published."""

import json

import pytest

from pipeline.__main__ import main
from pipeline.errors import UserError
from pipeline.insight.estimate.scaling import PUBLISHED, Links, exchange_s, parse_scale, predict

LINKS = Links(gpus_per_node=8, inside_gb_s=100, outside_gb_s=10, latency_us=10)


def test_an_exchange_is_a_ring_within_nodes_and_one_among_them():
    assert exchange_s(1, 1e9, LINKS) == 0
    assert exchange_s(8, 1e9, LINKS) == pytest.approx(2 * 7 / 8 * 0.01 + 2 * 3 * 10e-6)
    among = 2 * 3 / 4 * 0.1
    assert exchange_s(32, 1e9, LINKS, buckets=4) == pytest.approx(2 * 7 / 8 * 0.01 + among + 4 * 2 * 5 * 10e-6)


def test_what_the_backward_pass_hides_costs_nothing():
    hidden = predict(8, 1.0, 100e6, LINKS, bucket_bytes=25e6, spread=0)
    assert hidden.exposed_s == pytest.approx(hidden.exchange_s / 4)  # the last bucket alone
    bare = predict(1024, 0.01, 1e9, LINKS, bucket_bytes=25e6, spread=0)
    assert bare.exposed_s == pytest.approx(bare.exchange_s - 0.01 * 2 / 3)
    assert bare.efficiency == pytest.approx(0.01 / (0.01 + bare.exposed_s))


def test_more_gpus_are_never_more_efficient():
    found = [predict(2**i, 0.1, 240e6, LINKS).efficiency for i in range(11)]
    assert found == sorted(found, reverse=True) and found[0] == 1


@pytest.mark.parametrize(("published", "within"), zip(PUBLISHED, (0.07, 0.03), strict=True))
def test_it_comes_near_to_what_was_published(published, within):
    assert abs(published.predicted() - published.efficiency) < within


def test_estimate_predicts_from_a_speed(capsys):
    options = ["--images_per_s", "1000", "--train.global_batch_size", "100", "--scale", "1..4", "--json"]
    assert main(["estimate", "--config", "smoke", *options]) == 0
    scaling = json.loads(capsys.readouterr().out)["scaling"]
    assert [row["gpus"] for row in scaling["rows"]] == [1, 2, 4] and scaling["alone_s"] == pytest.approx(0.1)
    assert scaling["rows"][0]["run_s"] == pytest.approx(90 * 1_281_167 / 1000)
    assert scaling["rows"][2]["global_batch_size"] == 400


def test_what_can_not_be_predicted_is_one_line(capsys):
    assert main(["estimate", "--config", "smoke", "--scale", "1..4"]) == 2
    assert "--scale needs the time of a step" in capsys.readouterr().err
    for text in ("0..8", "1..x", ""):
        with pytest.raises(UserError, match="--scale"):
            parse_scale(text)
    assert parse_scale("1,6,12") == [1, 6, 12] and parse_scale("1..1024")[-1] == 1024
