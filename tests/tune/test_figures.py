"""A search as plain data, and its figures: totals are those of a simulated store, every picture is drawn."""

import io
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import optuna
import pytest
from matplotlib.figure import Figure
from PIL import Image

from crowdray import storage
from crowdray.errors import DataError
from crowdray.tune.figures import MaeScale, draw_importance, draw_optimisation, draw_slices, time_unit
from crowdray.tune.importance import MIN_TRIALS, importances
from crowdray.tune.record import StageCost, StudyRecord, TrialRecord
from crowdray.tune.stage_layout import arrange, grow
from crowdray.tune.stage_tree import draw_stage_tree

STAGES = ("baseline", "decoders", "joint")
SECONDS = {"baseline": 40.0, "decoders": 25.0, "joint": 70.0}
State = Literal["complete", "pruned", "failed", "running"]


class Store:
    """The states of finished stages: a chain's longest stored beginning is reused, the rest is trained."""

    def __init__(self) -> None:
        self.costs: dict[tuple[str, int], float] = {}
        self.uses: Counter[tuple[str, int]] = Counter()

    def train(
        self, lengths: tuple[int, ...], weights: tuple[Any, ...], rng: np.random.Generator
    ) -> tuple[StageCost, ...]:
        legs, chain = [], ""
        for stage, length in zip(STAGES, lengths, strict=True):
            chain = f"{chain}/{stage}" + (f"{weights}" if stage == "joint" else "")
            epochs = [(chain, epoch) for epoch in range(1, length + 1)]
            reused = [epoch for epoch in epochs if epoch in self.costs]
            trained = [epoch for epoch in epochs if epoch not in self.costs]
            cost = SECONDS[stage] * rng.uniform(0.9, 1.1)
            saved = sum(self.costs[epoch] for epoch in reused)
            self.costs |= dict.fromkeys(trained, cost)
            self.uses.update(epochs)
            legs.append(StageCost(chain, stage, length, len(reused), cost * len(trained), saved))
            chain += f":{length}"
        return tuple(legs)


def searched(count: int, seed: int = 0, store: Store | None = None) -> StudyRecord:
    """A made-up search that closes in on the paper's weights; a bad weight costs MAE, so does a short stage."""
    rng, store = np.random.default_rng(seed), store or Store()
    trials = []
    for number in range(count):
        spread = 1.0 if number < 10 else 0.35
        weights = [float(f"{best * 10 ** rng.normal(0, spread):.3g}") for best in (0.04, 0.6, 1.0)]
        weights = [0.0 if rng.random() < 0.12 else weight for weight in weights]
        lengths = (int(rng.choice([8, 12, 16, 20])), int(rng.choice([2, 4, 6])), int(rng.choice([8, 12, 16, 24])))
        off = [1.2 if not w else abs(math.log10(w / b)) for w, b in zip(weights, (0.04, 0.6, 1.0), strict=True)]
        mae = 2.2 + 0.3 * off[0] + 1.1 * off[1] ** 2 + 0.5 * off[2] + 6 / lengths[0] + rng.exponential(0.15)
        state: State = "complete"
        if number % 16 == 13:
            state, lengths = "failed", (*lengths[:2], 2)
        elif mae > 4.3 and number > 4:
            state, lengths = "pruned", (*lengths[:2], 4)
        names = (
            *(f"loss.{task}" for task in ("segmentation", "depth", "count")),
            *(f"stages.{s}.epochs" for s in STAGES),
        )
        found = None if state == "failed" else mae
        curve = {} if found is None else {epoch: found + 1 / epoch for epoch in range(1, lengths[2] + 1)}
        legs = store.train(lengths, tuple(weights), rng)
        values = dict(zip(names, (*weights, *lengths), strict=True))
        rmse = None if found is None else found * 1.3
        reason = "loss is nan" if state == "failed" else ""
        trials.append(TrialRecord(number, state, values, found, rmse, curve, legs, reason))
    return StudyRecord("mall-weights", tuple(trials))


@pytest.fixture(scope="module")
def store() -> Store:
    return Store()


@pytest.fixture(scope="module")
def study(store: Store) -> StudyRecord:
    return searched(32, 1, store)


def draw_bars(study: StudyRecord, path: str) -> None:
    draw_importance(study, importances(study), path)


FIGURES: list[Callable[[StudyRecord, str], None]] = [draw_optimisation, draw_bars, draw_slices, draw_stage_tree]


def drawing(draw: Callable[[StudyRecord, str], None], study: StudyRecord) -> bytes:
    uri = f"memory://studies/{np.random.default_rng().integers(2**60)}.png"
    draw(study, uri)
    return storage.read_bytes(uri)


def words(figure: Figure) -> str:
    """All that a figure says outside of its axes."""
    legends = [text for legend in figure.legends for text in [*legend.get_texts(), legend.get_title()]]
    return "\n".join(text.get_text() for text in [*figure.texts, *legends])


def test_totals_are_those_of_the_store(study: StudyRecord, store: Store) -> None:
    once = sum(store.costs.values())
    everywhere = sum(store.costs[state] * uses for state, uses in store.uses.items())
    assert study.spent == pytest.approx(once)
    assert study.spent + study.saved == pytest.approx(everywhere)
    assert study.distinct == pytest.approx(once)
    assert study.speedup == pytest.approx(everywhere / once)
    assert study.max_speedup == pytest.approx(everywhere / once)


def test_the_bound_is_that_of_the_best_store_whatever_was_reused(study: StudyRecord) -> None:
    """Of the reused epochs of every other leg, the last half is trained again, for as much as it had cost."""
    trials = []
    for trial in study.trials:
        legs = []
        for place, leg in enumerate(trial.stage_costs):
            again = leg.reused // 2 if place % 2 == 0 else 0
            cost = leg.saved * again / leg.reused if again else 0.0
            legs.append(replace(leg, reused=leg.reused - again, seconds=leg.seconds + cost, saved=leg.saved - cost))
        trials.append(replace(trial, stage_costs=tuple(legs)))
    wasteful = StudyRecord("wasteful", tuple(trials))
    assert wasteful.spent > study.spent
    assert wasteful.spent + wasteful.saved == pytest.approx(study.spent + study.saved)
    assert wasteful.max_speedup == pytest.approx(study.max_speedup, rel=0.02)
    assert wasteful.speedup < 0.97 * wasteful.max_speedup


def test_a_search_over_a_filled_store_passes_its_bound() -> None:
    store = Store()
    searched(20, 5, store)
    again = searched(20, 5, store)
    assert (again.spent, again.speedup) == (0.0, math.inf)
    assert 1 < again.max_speedup < math.inf
    assert StudyRecord("new", ()).speedup == StudyRecord("new", ()).max_speedup == 1.0


def test_the_best_is_complete_and_the_first_of_equals(study: StudyRecord) -> None:
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


def test_json_gives_the_search_back(study: StudyRecord) -> None:
    values: dict[str, float | int | str | bool] = {"flag": True, "name": "adam", "whole": 3, "real": 3.0}
    odd = replace(study.trials[0], values=values)
    for record in (study, StudyRecord("odd", (odd,)), StudyRecord("new", ())):
        back = StudyRecord.from_json(record.to_json(), "study.json")
        assert back == record
        for old, new in zip(record.trials, back.trials, strict=True):
            assert [*map(type, new.values.values())] == [*map(type, old.values.values())]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"reused": 0', '"reused": 99'),
        ('"state": "complete"', '"state": "lost"'),
        ('"seconds": ', '"seconds": -'),
        ('"number": 0, ', ""),
        ('"trials"', "trials"),
    ],
)
def test_a_broken_record_is_named(old: str, new: str) -> None:
    text = searched(1).to_json()
    assert old in text
    with pytest.raises(DataError, match=r"s3://runs/study.json is not the record of a search"):
        StudyRecord.from_json(text.replace(old, new, 1), "s3://runs/study.json")


def of_function(mae: Callable[[float, float, int], float], count: int = 60) -> StudyRecord:
    """A search of three fields, whose MAE is a known function of them."""
    rng = np.random.default_rng(3)
    trials = []
    for number in range(count):
        depth = 0.0 if rng.random() < 0.3 else float(10 ** rng.uniform(-2, 1))
        other, epochs = float(10 ** rng.uniform(-2, 1)), int(rng.integers(1, 8)) * 4
        values = {"loss.depth": depth, "loss.count": other, "stages.joint.epochs": epochs}
        found = mae(depth, other, epochs)
        trials.append(TrialRecord(number, "complete", values, found, found, {}, ()))
    return StudyRecord("known", tuple(trials))


Known = Callable[[float, float, int], float]


@pytest.mark.parametrize(
    ("mae", "shares"),
    [
        # Over log10(count) from -2 to 1, over 4 to 28 epochs in steps of 4, over depth kept or dropped; variances of
        # x, u and d are 3^2/12, (7^2 - 1)/12 * 4^2 and 1/4.
        (lambda depth, count, epochs: 9 + math.log10(count), (0.0, 1.0, 0.0)),
        (lambda depth, count, epochs: 9 - epochs / 4 + (depth > 0), (0.25 / 4.25, 0.0, 4 / 4.25)),
        (lambda depth, count, epochs: 9 - epochs / 8 + math.log10(count), (0.0, 0.75 / 1.75, 1 / 1.75)),
        (lambda depth, count, epochs: 2.0 if depth == 0 else 3.0, (1.0, 0.0, 0.0)),
    ],
)
def test_importances_are_shares_of_a_known_functions_variance(mae: Known, shares: tuple[float, float, float]) -> None:
    verbosity = optuna.logging.get_verbosity()
    found = importances(of_function(mae, 200))
    expected = dict(zip(("loss.depth", "loss.count", "stages.joint.epochs"), shares, strict=True))
    assert found == pytest.approx(expected, abs=0.08)
    assert sum(found.values()) == pytest.approx(1)
    assert [*found.values()] == sorted(found.values(), reverse=True)
    assert optuna.logging.get_verbosity() == verbosity


@pytest.mark.parametrize("seed", range(5))
def test_few_trials_gathered_at_a_weight_do_not_make_it_matter(seed: int) -> None:
    """As a search by TPE ends: most trials have nearly one weight, and the epochs alone decide."""
    rng = np.random.default_rng(seed)
    trials = []
    for number in range(16):
        epochs = 2 if number < 4 else 5
        count = float(10 ** (rng.uniform(-2, 1) if number < 6 else rng.normal(0.4, 0.05)))
        mae = 15.0 - epochs + 0.2 * rng.random()
        values = {"loss.count": count, "stages.baseline.epochs": epochs}
        trials.append(TrialRecord(number, "complete", values, mae, mae, {}, ()))
    assert importances(StudyRecord("gathered", tuple(trials)))["stages.baseline.epochs"] > 0.8


def test_importances_need_complete_trials_that_differ() -> None:
    known = of_function(lambda depth, count, epochs: 1 + count)
    few = StudyRecord("few", known.trials[: MIN_TRIALS - 1])
    pruned = StudyRecord("pruned", tuple(replace(trial, state="pruned") for trial in known.trials))
    same = StudyRecord("same", tuple(replace(trial, values={"seed": 1}) for trial in known.trials))
    dropped = StudyRecord("dropped", tuple(replace(trial, values={"loss.depth": 0.0}) for trial in known.trials))
    nearly = StudyRecord("nearly", tuple(replace(t, mae=2 + 1e-9 * (t.number == 0)) for t in known.trials))
    for study in (
        few,
        pruned,
        same,
        dropped,
        nearly,
        of_function(lambda depth, count, epochs: 2.0),
        StudyRecord("new", ()),
    ):
        assert importances(study) == {}
    assert importances(StudyRecord("enough", known.trials[:MIN_TRIALS]))


def test_fields_of_every_kind_have_an_importance() -> None:
    known = of_function(lambda depth, count, epochs: 1 + count)
    kinds = [
        {"optimizer.name": "adam" if n % 3 else "sgd", "flag": n % 2 == 0, "shift": n - 30.5, "loss.depth": n % 5}
        | ({"only.adam": 0.1 * (n % 7 + 1)} if n % 3 else {})
        for n in range(60)
    ]
    study = StudyRecord("kinds", tuple(replace(t, values=v) for t, v in zip(known.trials, kinds, strict=True)))
    assert importances(study).keys() == {"optimizer.name", "flag", "shift", "loss.depth", "only.adam"}
    assert drawing(draw_slices, study)


@pytest.mark.parametrize("count", [1, 3, 32, 200])
def test_the_stage_tree_holds_every_state_once_and_every_trial(count: int) -> None:
    store = Store()
    study = searched(count, 2, store)
    layout = arrange(grow(study))
    states: Counter[tuple[str, int]] = Counter()
    for root in layout.roots:
        for segment in root.walk():
            assert all(child.start == segment.end for child in segment.children)
            assert len(segment.trials) == len(segment.ended) + sum(len(child.trials) for child in segment.children)
            states[segment.chain, segment.end - segment.start] += len(segment.trials)
    epochs = sum(s.end - s.start for s in layout.segments())
    assert epochs == len(store.costs)
    assert sum((s.end - s.start) * len(s.trials) for s in layout.segments()) == sum(store.uses.values())
    tips = [tip for family in layout.families for tip in family.tips]
    assert sorted(tip.trial.number for tip in tips) == list(range(count))
    rows = [tip.y for tip in tips]
    assert rows == sorted(set(rows)) and rows[0] > 0 and rows[-1] < layout.height
    assert any(family.fan for family in layout.families) == (count == 200)


def edge_cases() -> dict[str, StudyRecord]:
    some = searched(6, 4)
    first = some.trials[0]
    failed = [replace(t, state="failed", mae=None, rmse=None, curve={}, reason="lost") for t in some.trials]
    return {
        "none": StudyRecord("none", ()),
        "one": StudyRecord("one", some.trials[:1]),
        "failed": StudyRecord("failed", tuple(failed)),
        "idle": StudyRecord("idle", (replace(first, stage_costs=(), state="running", mae=None, rmse=None),)),
        "running": StudyRecord("running", (*some.trials[:5], replace(first, number=5, state="running", mae=math.nan))),
        "equal": StudyRecord("equal", tuple(replace(t, mae=0.0, state="complete") for t in some.trials)),
        "twins": StudyRecord("twins", tuple(replace(first, number=number) for number in range(50))),
        "free": StudyRecord("free", tuple(replace(t, values={}, stage_costs=t.stage_costs[:1]) for t in some.trials)),
    }


@pytest.mark.parametrize("draw", FIGURES)
@pytest.mark.parametrize("case", edge_cases())
def test_no_search_is_too_odd_to_draw(draw: Callable[[StudyRecord, str], None], case: str) -> None:
    picture = Image.open(io.BytesIO(drawing(draw, edge_cases()[case])))
    assert picture.format == "PNG"
    assert 800 <= picture.width <= 1600 and 200 <= picture.height <= 2200


@pytest.mark.parametrize("draw", FIGURES)
def test_figures_are_the_same_twice(draw: Callable[[StudyRecord, str], None]) -> None:
    study = searched(8, 1)
    assert drawing(draw, study) == drawing(draw, StudyRecord.from_json(study.to_json(), "here"))


def test_the_optimisation_falls_to_the_best(study: StudyRecord, drawn: list[Figure]) -> None:
    drawing(draw_optimisation, study)
    best = study.best()
    assert best is not None
    over_trials, over_time = drawn[0].axes
    line, alone = over_trials.lines[0], over_time.lines[1]
    falls = np.asarray(line.get_ydata(), dtype=float)
    assert (np.diff(falls) <= 0).all() and falls[-1] == best.mae
    assert float(np.asarray(alone.get_xdata())[-1]) == pytest.approx((study.spent + study.saved) / 3600)
    assert f"MAE {best.mae:.2f} by trial {best.number}, of 32 trials" in drawn[0].get_suptitle()


def test_what_was_spent_adds_up_in_the_order_of_the_ends(drawn: list[Figure]) -> None:
    """All trials of a search by chance are drawn at once, and their shared beginnings decide who goes first."""
    some = [replace(trial, state="complete", ended=100.0 - trial.number) for trial in searched(6, 1).trials]
    under_way = replace(some[0], number=6, state="running", ended=None)
    study = StudyRecord("backwards", (under_way, *some))
    assert [trial.number for trial in study.by_end()] == [5, 4, 3, 2, 1, 0, 6]
    drawing(draw_optimisation, study)
    falls = drawn[0].axes[1].lines[0]
    first = some[-1]
    assert np.asarray(falls.get_ydata())[0] == first.mae
    assert np.asarray(falls.get_xdata())[0] * time_unit(study.spent + study.saved)[0] == pytest.approx(first.spent)


def test_slices_set_zero_apart_and_show_the_papers_weights(study: StudyRecord, drawn: list[Figure]) -> None:
    drawing(draw_slices, study)
    panels = [axes for axes in drawn[0].axes if axes.get_xlabel().startswith("loss.")]
    for axes, weight in zip(panels, (0.04, 0.6, 1.0), strict=True):
        assert [float(np.asarray(line.get_xdata())[0]) for line in axes.lines] == [pytest.approx(math.log10(weight))]
        labels = [text.get_text() for text in axes.get_xticklabels()]
        assert labels[0] == "0\ndropped" and "0" not in labels[1:]
        ticks = axes.get_xticks()
        assert (np.diff(ticks) > 0).all()


@pytest.mark.parametrize("count", [32, 200])
def test_words_beside_the_tree_never_touch(count: int, drawn: list[Figure]) -> None:
    study = searched(count, 1)
    drawing(draw_stage_tree, study)
    tree, _ = drawn[0].axes
    beside = [text for text in tree.texts if text.get_position()[0] > 0 and text.get_bbox_patch() is None]
    boxes = [text.get_window_extent() for text in [*beside, *drawn[0].texts]]
    overlaps = [(a, b) for n, a in enumerate(boxes) for b in boxes[:n] if a.shrunk(0.98, 0.8).overlaps(b)]
    assert len(beside) >= min(count, 12) and not overlaps
    assert f"{study.speedup:.2f} times as much training" in words(drawn[0])
    assert f"twice: {study.max_speedup:.2f} times" in words(drawn[0])


def test_trials_beside_many_that_share_the_best_error_have_their_places(study: StudyRecord) -> None:
    maes = [9.0] * 6 + [10.0, 11.0, 12.0]
    trials = [replace(study.trials[0], number=n, state="complete", mae=mae) for n, mae in enumerate(maes)]
    scale = MaeScale(trials)
    assert scale.limit == 12.0 and not scale.beyond
    assert [scale(trial) for trial in trials] == maes


def test_a_figure_without_importances_says_why(drawn: list[Figure]) -> None:
    drawing(draw_bars, searched(2))
    assert "there are 2" in words(drawn[0])
