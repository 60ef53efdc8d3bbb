"""The runner and its report, with a contestant that does nothing: what is measured here is never a speed."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import cases, convolutions, report, rounds
from benchmarks.cases import CASES, CONTESTANTS, Case, Goal
from configs import fashion_mnist
from xception_jax.config import override, resolve
from xception_jax.models import create_model
from xception_jax.models.cost import count_cost

NOTHING = "def prepare(work, options):\n    return (lambda: None), options.get('parameters', 7)\n"


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A case with three contestants in processes of their own; the third cannot start."""
    package = tmp_path / "fakes"
    package.mkdir()
    (package / "nothing.py").write_text(NOTHING)
    (package / "broken.py").write_text("raise ImportError('no such peer')\n")
    # The worker imports cases.py afresh, so the contestants have to be known there too.
    (package / "sitecustomize.py").write_text(
        "import benchmarks.cases as cases, benchmarks.contestants as contestants\n"
        f"contestants.__path__.append({str(package)!r})\n"
        "for name in ('nothing', 'broken'):\n"
        "    cases.CONTESTANTS[name] = cases.Contestant(name, name)\n"
        "cases.CONTESTANTS['ours'] = cases.Contestant('ours', 'nothing')\n"
    )
    path = f"{package}:{rounds.ROOT}"
    for name, module in (("ours", "nothing"), ("nothing", "nothing"), ("broken", "broken")):
        contestant = cases.Contestant(name, module, environment={"PYTHONPATH": path})
        monkeypatch.setitem(CONTESTANTS, name, contestant)
    case = Case("nothing at all", {"kind": "train", "batch": 2}, (Goal("rate", 1.0, ("nothing", "broken")),), 7)
    monkeypatch.setitem(CASES, "fake", case)
    return case


def _measure(case):
    said: list[str] = []
    return rounds.measure(case, sys.executable, 3, 0.01, said.append, ""), said


def _results(contestants):
    about = {"command": "python -m benchmarks --cases=fake", "repeats": 3, "date": "2026-01-01", "commit": "abc"}
    about["hardware"] = "y"
    return {"cases": {"fake": about | {"contestants": contestants}}}


def test_workers_take_turns_and_one_that_fails_is_named(fake):
    contestants, said = _measure(fake)
    for name in ("ours", "nothing"):
        assert len(contestants[name]["samples"]["rate"]) == len(contestants[name]["samples"]["others"]) == 3
        assert "jax" in contestants[name]["versions"]
    assert "no such peer" in contestants["broken"]["error"]
    # The order rotates: each round is begun by the next contestant.
    order = [line.split(", ")[1].split(":")[0] for line in said if "round" in line]
    assert order == ["ours", "nothing", "broken", "nothing", "broken", "ours", "broken", "ours", "nothing"]

    text = report.markdown(_results(contestants))
    assert "open: no figure of broken" in text
    assert "| broken | failed |" in text


def test_a_fresh_case_measures_start_and_memory(fake, monkeypatch):
    monkeypatch.setitem(CONTESTANTS, "broken", CONTESTANTS["nothing"])
    goals = (Goal("start", 1.0, ("nothing",)), Goal("memory", 1.0, ("nothing",)))
    contestants, _ = _measure(Case("nothing", fake.work, goals, 7, fresh=True))
    assert all(seconds > 0 for seconds in contestants["ours"]["samples"]["start"])
    assert all(0 < gigabytes < 1 for gigabytes in contestants["ours"]["samples"]["memory"])


def test_other_networks_do_not_count(fake):
    contestants, _ = _measure(Case(fake.title, fake.work, fake.goals, parameters=8))
    assert contestants["ours"]["error"] == "the network has 7 parameters, not 8"


def _contestant(*samples, others=0.0):
    return {"samples": {"rate": list(samples), "start": list(samples), "others": [others]}, "versions": {}}


def test_a_ratio_compares_rounds_with_the_best_peer():
    contestants = {
        "ours": _contestant(10.0, 30.0, 20.0),
        "timm": _contestant(5.0, 10.0, 20.0),
        "flax": _contestant(9.0, 9.0, 9.0),
    }
    verdict = report.judge(Goal("rate", 2.5, ("timm", "flax")), contestants)
    assert (verdict.best, verdict.ratio) == ("timm", (1.5, 2.0, 2.5))
    assert str(verdict) == "**goal 2.5, reached 2.00**"
    assert str(report.judge(Goal("rate", 2.0, ("timm", "flax")), contestants)) == "reached"
    # Of seconds and bytes, fewer are better.
    verdict = report.judge(Goal("start", 1.0, ("timm", "flax")), contestants)
    assert (verdict.best, verdict.ratio[1]) == ("flax", 0.45)


def test_a_disturbed_measurement_says_so():
    contestants = {"ours": _contestant(2.0, others=0.3), "timm": _contestant(1.0, others=0.3)}
    assert str(report.judge(Goal("rate", 1.0, ("timm",)), contestants)) == "open: machine not idle (30% taken)"


def test_quartiles_of_one_and_of_many():
    assert report.quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert report.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def test_plots_are_drawn(fake, tmp_path):
    contestants, _ = _measure(fake)
    report.plot(_results(contestants), tmp_path / "bars.png")
    report.plot_growth({"batch": [{"value": 1, "seconds": 0.1, "memory": 0.2}]}, tmp_path / "growth.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000
    assert (tmp_path / "growth.png").stat().st_size > 1000


def test_the_cases_are_complete_and_listed(run_python):
    for case in CASES.values():
        assert set(case.contestants) <= set(CONTESTANTS)
        assert {goal.measure for goal in case.goals} <= {"start", "memory"} if case.fresh else {"rate"}
    done = run_python("-m", "benchmarks", "--list", "--json")
    assert list(json.loads(done.stdout)) == list(CASES)
    done = run_python("-m", "benchmarks", "--cases", "nonsense")
    assert done.returncode == 64
    assert "there is no case 'nonsense'" in done.stderr


def test_convolutions_of_a_network_are_found_and_timed():
    config = override(resolve(fashion_mnist.get_config()), {"batch_size": 2})
    found = convolutions.find_convolutions(config)
    by_layer = count_cost(create_model(config.model), config.data.image_size).multiply_adds_by_layer
    in_convolutions = sum(count for layer, count in by_layer.items() if layer != "head/predictions")
    assert sum(count * convolution.flops for convolution, count in found.items()) == 2 * 2 * in_convolutions

    milliseconds = convolutions.measure(next(iter(found)), "float32", 0.0)
    assert list(milliseconds) == list(convolutions.KINDS)
    assert min(milliseconds.values()) > 0
