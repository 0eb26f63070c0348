"""A search as plain data: its totals equal those of a simulated cache, its figures can be drawn."""

import io
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from pydantic import TypeAdapter

from crowdray import storage
from crowdray.tune.figures import draw_importance, draw_optimization, draw_slices, time_unit
from crowdray.tune.importance import MIN_TRIALS, importance_intervals, importances
from crowdray.tune.record import StageCost, StudyRecord, TrialRecord
from crowdray.tune.stage_tree import build_tree, draw_stage_tree, lay_out

STAGES = ("baseline", "decoders", "joint")
FIELDS = ("loss.segmentation", "loss.depth", "loss.count", *(f"stages.{stage}.epochs" for stage in STAGES))
SECONDS = {"baseline": 40.0, "decoders": 25.0, "joint": 70.0}
READER = TypeAdapter(StudyRecord)
State = Literal["complete", "pruned", "failed", "running"]


class Cache:
    """A simulated stage cache: stored epochs of a stage key are reused, the rest is trained."""

    def __init__(self) -> None:
        self.costs: dict[tuple[str, int], float] = {}
        self.uses: Counter[tuple[str, int]] = Counter()

    def train(
        self, lengths: tuple[int, ...], weights: tuple[Any, ...], rng: np.random.Generator
    ) -> tuple[StageCost, ...]:
        costs, key = [], ""
        for stage, length in zip(STAGES, lengths, strict=True):
            key = f"{key}/{stage}" + (f"{weights}" if stage == "joint" else "")
            epochs = [(key, epoch) for epoch in range(1, length + 1)]
            reused = [epoch for epoch in epochs if epoch in self.costs]
            trained = [epoch for epoch in epochs if epoch not in self.costs]
            cost = SECONDS[stage] * rng.uniform(0.9, 1.1)
            saved = math.fsum(self.costs[epoch] for epoch in reused)
            self.costs |= dict.fromkeys(trained, cost)
            self.uses.update(epochs)
            costs.append(StageCost(key, stage, length, len(reused), cost * len(trained), saved))
            key += f":{length}"
        return tuple(costs)


def make_study(count: int, seed: int = 0, cache: Cache | None = None) -> StudyRecord:
    """A simulated search that converges to the paper's weights; short stages increase the MAE."""
    rng, cache = np.random.default_rng(seed), cache or Cache()
    trials = []
    for number in range(count):
        deviation = 1.0 if number < 10 else 0.35
        weights = [float(f"{best * 10 ** rng.normal(0, deviation):.3g}") for best in (0.04, 0.6, 1.0)]
        weights = [0.0 if rng.random() < 0.12 else weight for weight in weights]
        lengths = (int(rng.choice([8, 12, 16, 20])), int(rng.choice([2, 4, 6])), int(rng.choice([8, 12, 16, 24])))
        off = [1.2 if not w else abs(math.log10(w / b)) for w, b in zip(weights, (0.04, 0.6, 1.0), strict=True)]
        mae = 2.2 + 0.3 * off[0] + 1.1 * off[1] ** 2 + 0.5 * off[2] + 6 / lengths[0] + rng.exponential(0.15)
        state: State = "complete"
        if number % 16 == 13:
            state, lengths = "failed", (*lengths[:2], 2)
        elif mae > 4.3 and number > 4:
            state, lengths = "pruned", (*lengths[:2], 4)
        values = dict(zip(FIELDS, (*weights, *lengths), strict=True))
        found = None if state == "failed" else mae
        trials.append(TrialRecord(number, state, values, found, found, {}, cache.train(lengths, tuple(weights), rng)))
    return StudyRecord("mall-weights", tuple(trials))


@pytest.fixture(scope="module")
def cache() -> Cache:
    return Cache()


@pytest.fixture(scope="module")
def study(cache: Cache) -> StudyRecord:
    return make_study(32, 1, cache)


def draw_bars(study: StudyRecord, path: str) -> None:
    draw_importance(study, importances(study), path)


FIGURES: list[Callable[[StudyRecord, str], None]] = [draw_optimization, draw_bars, draw_slices, draw_stage_tree]


def draw_bytes(draw: Callable[[StudyRecord, str], None], study: StudyRecord) -> bytes:
    uri = f"memory://studies/{np.random.default_rng().integers(2**60)}.png"
    draw(study, uri)
    return storage.read_bytes(uri)


def test_totals_equal_those_of_the_cache(study: StudyRecord, cache: Cache) -> None:
    once = sum(cache.costs.values())
    everywhere = sum(cache.costs[state] * uses for state, uses in cache.uses.items())
    assert study.spent == pytest.approx(once)
    assert study.spent + study.saved == pytest.approx(everywhere)
    assert study.speedup == pytest.approx(everywhere / once)
    cached = make_study(32, 1, cache)
    assert (cached.spent, cached.speedup, StudyRecord("new", ()).speedup) == (0.0, math.inf, 1.0)


def test_best_is_complete_and_the_first_of_equals(study: StudyRecord) -> None:
    best = study.best()
    complete = [trial.mae for trial in study.trials if trial.state == "complete" and trial.mae is not None]
    assert best is not None and best.mae == min(complete)
    states: list[State] = ["pruned", "complete", "complete", "running", "failed"]
    maes = [1.0, 2.0, 2.0, 1.5, None]
    trials = [
        replace(study.trials[0], number=number, state=state, mae=mae)
        for number, (state, mae) in enumerate(zip(states, maes, strict=True))
    ]
    assert StudyRecord("", tuple(trials)).best() is trials[1]
    assert StudyRecord("", (replace(trials[1], mae=math.nan), trials[0])).best() is None


def test_study_record_survives_json(study: StudyRecord) -> None:
    values: dict[str, float | int | str | bool] = {"flag": True, "name": "adam", "whole": 3, "real": 3.0}
    odd = replace(study.trials[0], values=values, curve={1: 2.5}, reason="lost", ended=1.5)
    for record in (study, StudyRecord("odd", (odd,)), StudyRecord("new", ())):
        assert repr(READER.validate_json(record.to_json())) == repr(record)


def test_stage_cost_with_impossible_numbers_is_refused() -> None:
    for reused, seconds in ((3, 1.0), (-1, 1.0), (1, -1.0), (1, math.nan)):
        with pytest.raises(ValueError, match="joint: "):
            StageCost("key", "joint", 2, reused, seconds, 0.0)


def study_of(mae: Callable[[float, float, int], float], count: int = 60) -> StudyRecord:
    """A search over three fields whose MAE is a known function of them."""
    rng = np.random.default_rng(3)
    trials = []
    for number in range(count):
        depth = 0.0 if rng.random() < 0.3 else float(10 ** rng.uniform(-2, 1))
        other, epochs = float(10 ** rng.uniform(-2, 1)), int(rng.integers(1, 8)) * 4
        values = {"loss.depth": depth, "loss.count": other, "stages.joint.epochs": epochs}
        found = mae(depth, other, epochs)
        trials.append(TrialRecord(number, "complete", values, found, found, {}, ()))
    return StudyRecord("known", tuple(trials))


MaeFunction = Callable[[float, float, int], float]


@pytest.mark.parametrize(
    ("mae", "fractions"),
    [
        # log10(count) from -2 to 1, 4 to 28 epochs in steps of 4, depth kept or dropped; their variances are
        # 3^2/12, (7^2 - 1)/12 * 4^2 and 1/4.
        (lambda depth, count, epochs: 9 + math.log10(count), (0.0, 1.0, 0.0)),
        (lambda depth, count, epochs: 9 - epochs / 4 + (depth > 0), (0.25 / 4.25, 0.0, 4 / 4.25)),
        (lambda depth, count, epochs: 9 - epochs / 8 + math.log10(count), (0.0, 0.75 / 1.75, 1 / 1.75)),
        (lambda depth, count, epochs: 2.0 if depth == 0 else 3.0, (1.0, 0.0, 0.0)),
    ],
)
def test_importances_decompose_the_variance_of_a_known_function(
    mae: MaeFunction, fractions: tuple[float, float, float]
) -> None:
    found = importances(study_of(mae, 200))
    expected = dict(zip(("loss.depth", "loss.count", "stages.joint.epochs"), fractions, strict=True))
    assert found == pytest.approx(expected, abs=0.08)
    assert sum(found.values()) == pytest.approx(1)
    assert [*found.values()] == sorted(found.values(), reverse=True)


@pytest.mark.parametrize("seed", range(5))
def test_importances_ignore_where_trials_concentrate(seed: int) -> None:
    """As at the end of a TPE search: most trials have almost the same weight, and only the epochs matter."""
    rng = np.random.default_rng(seed)
    trials = []
    for number in range(16):
        epochs = 2 if number < 4 else 5
        count = float(10 ** (rng.uniform(-2, 1) if number < 6 else rng.normal(0.4, 0.05)))
        mae = 15.0 - epochs + 0.2 * rng.random()
        values = {"loss.count": count, "stages.baseline.epochs": epochs}
        trials.append(TrialRecord(number, "complete", values, mae, mae, {}, ()))
    assert importances(StudyRecord("concentrated", tuple(trials)))["stages.baseline.epochs"] > 0.8


def test_importances_without_enough_different_complete_trials_are_empty() -> None:
    known = study_of(lambda depth, count, epochs: 1 + count)
    studies = [
        known.trials[: MIN_TRIALS - 1],
        [replace(trial, state="pruned") for trial in known.trials],
        [replace(trial, values={"seed": 1}) for trial in known.trials],
        [replace(trial, values={"loss.depth": 0.0}) for trial in known.trials],
        [replace(trial, mae=2.0) for trial in known.trials],
        [replace(trial, mae=2 + 1e-9 * (trial.number == 0)) for trial in known.trials],
        [],
    ]
    assert [importances(StudyRecord("", tuple(trials))) for trials in studies] == [{}] * len(studies)
    assert importances(StudyRecord("enough", known.trials[:MIN_TRIALS]))


def test_importances_support_fields_of_every_type() -> None:
    known = study_of(lambda depth, count, epochs: 1 + count)
    kinds = [
        {"optimizer.name": "adam" if n % 3 else "sgd", "flag": n % 2 == 0, "shift": n - 30.5, "loss.depth": n % 5}
        for n in range(60)
    ]
    study = StudyRecord("kinds", tuple(replace(t, values=v) for t, v in zip(known.trials, kinds, strict=True)))
    assert importances(study).keys() == {"optimizer.name", "flag", "shift", "loss.depth"}
    draw_bytes(draw_slices, study)


@pytest.mark.parametrize("count", [1, 3, 32, 200])
def test_stage_tree_contains_every_state_once_and_every_trial(count: int) -> None:
    cache = Cache()
    study = make_study(count, 2, cache)
    roots = build_tree(study)
    rows = lay_out(roots)
    segments = [segment for root in roots for segment in root.walk()]
    for segment in segments:
        assert all(child.start == segment.end for child in segment.children)
        assert len(segment.trials) == len(segment.ended) + sum(len(child.trials) for child in segment.children)
    assert sum(s.end - s.start for s in segments) == len(cache.costs)
    assert sum((s.end - s.start) * len(s.trials) for s in segments) == sum(cache.uses.values())
    assert sorted(trial.number for trial in rows) == list(range(count))


def edge_cases() -> dict[str, StudyRecord]:
    some = make_study(6, 4)
    first = some.trials[0]
    return {
        "none": StudyRecord("none", ()),
        "one": StudyRecord("one", some.trials[:1]),
        "failed": StudyRecord("failed", tuple(replace(t, state="failed", mae=None) for t in some.trials)),
        "idle": StudyRecord("idle", (replace(first, stage_costs=(), state="running", mae=None),)),
        "running": StudyRecord("running", (*some.trials[:5], replace(first, number=5, state="running", mae=math.nan))),
        "equal": StudyRecord("equal", tuple(replace(t, mae=0.0, state="complete") for t in some.trials)),
        "twins": StudyRecord("twins", tuple(replace(first, number=number) for number in range(50))),
        "free": StudyRecord("free", tuple(replace(t, values={}, stage_costs=t.stage_costs[:1]) for t in some.trials)),
    }


@pytest.mark.parametrize("draw", FIGURES)
@pytest.mark.parametrize("case", edge_cases())
def test_figures_of_unusual_studies_can_be_drawn(draw: Callable[[StudyRecord, str], None], case: str) -> None:
    image = Image.open(io.BytesIO(draw_bytes(draw, edge_cases()[case])))
    assert image.format == "PNG"
    assert 800 <= image.width <= 1600 and 200 <= image.height <= 2200


@pytest.mark.parametrize("draw", FIGURES)
def test_figures_are_deterministic(draw: Callable[[StudyRecord, str], None]) -> None:
    study = make_study(8, 1)
    assert draw_bytes(draw, study) == draw_bytes(draw, READER.validate_json(study.to_json()))


def test_optimization_figure_descends_to_the_best(study: StudyRecord, drawn: list[Figure]) -> None:
    draw_bytes(draw_optimization, study)
    best = study.best()
    assert best is not None
    over_trials, over_time = drawn[0].axes
    line, without_cache = over_trials.lines[0], over_time.lines[1]
    values = np.asarray(line.get_ydata())
    assert (np.diff(values) <= 0).all() and values[-1] == best.mae
    assert float(np.asarray(without_cache.get_xdata())[-1]) == pytest.approx((study.spent + study.saved) / 3600)
    assert f"MAE {best.mae:.2f} by trial {best.number}, of 32 trials" in drawn[0].get_suptitle()


def test_optimization_figure_adds_up_time_in_the_order_of_ends(drawn: list[Figure]) -> None:
    """A random search samples all trials at once, and starts them in the order of their shared prefixes."""
    some = [replace(trial, state="complete", ended=100.0 - trial.number) for trial in make_study(6, 1).trials]
    running = replace(some[0], number=6, state="running", ended=None)
    study = StudyRecord("backwards", (running, *some))
    assert [trial.number for trial in study.by_end()] == [5, 4, 3, 2, 1, 0, 6]
    draw_bytes(draw_optimization, study)
    line = drawn[0].axes[1].lines[0]
    first = some[-1]
    assert np.asarray(line.get_ydata())[0] == first.mae
    assert np.asarray(line.get_xdata())[0] * time_unit(study.spent + study.saved)[0] == pytest.approx(first.spent)


def test_slices_figure_shows_the_paper_weights_and_dropped_tasks(study: StudyRecord, drawn: list[Figure]) -> None:
    draw_bytes(draw_slices, study)
    panels = [axes for axes in drawn[0].axes if axes.get_xlabel().startswith("loss.")]
    for axes, weight in zip(panels, (0.04, 0.6, 1.0), strict=True):
        assert [float(np.asarray(line.get_xdata())[0]) for line in axes.lines] == [weight]
        assert axes.get_xscale() == "symlog" and "0" in [label.get_text() for label in axes.get_xticklabels()]


@pytest.mark.parametrize(("count", "labels"), [(32, 32), (200, 1)])
def test_stage_tree_labels_do_not_overlap(count: int, labels: int, drawn: list[Figure]) -> None:
    study = make_study(count, 1)
    draw_bytes(draw_stage_tree, study)
    tree, dots = drawn[0].axes
    found = [label for label in dots.get_yticklabels() if label.get_text()]
    for boxes in ([text.get_window_extent() for text in texts] for texts in (found, tree.texts)):
        assert not [(a, b) for n, a in enumerate(boxes) for b in boxes[:n] if a.shrunk(0.98, 0.8).overlaps(b)]
    best = study.best()
    assert best is not None and len(found) == labels
    assert f"{best.number}   {best.mae:.2f}" in [label.get_text() for label in found]
    assert f"speedup {study.speedup:.2f}" in drawn[0].get_suptitle()


def test_mae_limit_draws_outliers_at_the_limit_unless_most_trials_are_equal(
    study: StudyRecord, drawn: list[Figure]
) -> None:
    for maes, limit in (([9.0] * 6 + [10.0, 11.0, 12.0], math.inf), ([9.0, *[10.0] * 7, 90.0], 13.0)):
        trials = tuple(replace(study.trials[0], number=n, state="complete", mae=mae) for n, mae in enumerate(maes))
        draw_bytes(draw_optimization, StudyRecord("", trials))
        points = np.asarray(drawn[-1].axes[0].collections[0].get_offsets())
        assert points[:, 1].tolist() == [min(mae, limit) for mae in maes]


def test_importance_figure_without_importances_states_why(drawn: list[Figure]) -> None:
    draw_bytes(draw_bars, make_study(2))
    assert "there are 2" in drawn[0].texts[1].get_text()


def test_importance_intervals_of_a_deciding_field_are_high_and_drawn(drawn: list[Figure]) -> None:
    study = study_of(lambda depth, count, epochs: 9 + math.log10(count), 20)
    low, high = importance_intervals(study)["loss.count"]
    assert 0.5 < low <= high <= 1
    draw_importance(study, importances(study), "memory://figures/importance.png", importance_intervals(study))
    assert "too few" in drawn[0].axes[0].get_xlabel()
    assert importance_intervals(replace(study, trials=study.trials[:2])) == {}
