"""Standard terms only: the wordings that docs/glossary.md replaces occur nowhere else in the repository.

`python tests/test_wording.py PATH...` lists every hit below these paths, with the standard term.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEARCHED = ("platform", "jobs", "tests", "benchmarks", "docs", "examples", "infra", ".github", ".ci")
SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".cff", ".ipynb", ""}
EXCLUDED = {ROOT / "docs" / "glossary.md", Path(__file__).resolve()}

# (pattern, standard term); prose patterns ignore case, names do not.
PROSE = {
    r"mend(s|ed|ing|able)?": "fix",
    r"told|(?<!\.)tell|tells|telling|heard|hears?": "log, report, pass, say",
    r"gives": "returns, yields, provides",
    r"go(es|ne|ing)? on|went on": "resume, continue",
    r"begun|began|beginnings?": "started; start, prefix",
    r"(?<!there )(is|are|was|were) no(?! (longer|more|way|need|such)\b)": "is not a, unknown",
    r"(?<!there )holds no|knows no": "does not contain, unknown option",
    r"ships?|shipped|shipping": "export, publish, deploy",
    r"trainings|(a|one|each|every|this|that|its|whole|finished|same|another) training"
    r"(?! (and|batch|crop|data|dataset|epoch|frame|image|job|loop|part|photo|process|run|set|split)s?\b)"
    r"(?! (result|stage|state|step|window|row)s?\b)": "training run",
    r"poor trials?|by chance": "unpromising trial; random search",
    r"(?<!in )(?<!take )(?<!takes )(?<!took )places?(?! holder)": "path, URI, position, slot",
    r"(a|the|its|this|each|whose|stated|worker's|rank's|large|small) share|share of": "fraction, rank slice",
    r"room": "free bytes, padding, space",
    r"beside": "next to, alongside, besides",
    r"as they were published|of one's own|one's own": "official layout; your own",
    r"whoever|somebody|nobody": "say who or what does it",
    r"house|roof": "package, layers (a photo may show a house: say building)",
}
NAMES = {
    r"Book|heard": "TrialTracker, on_report",
    r"Leg|legs": "StageCost, stage_costs",
    r"Shelf|shelf|Sharing|announced|go_on_from": "StageCacheConfig, StageCacheSession, advertise, resume_from",
    r"Chain|chains_of": "StageKey, stage_keys",
    r"Keeper|keeper|living": "LeaseRenewer, alive, collect",
    r"ship|spread|listener|is_loss": "publish_run, map_slices, callbacks, is_worker_loss",
    r"fitting|fitted|fastest": "batch_size_finder, find_batch_size",
    r"RunningStage|Training(?= ?[\(\].,:])": "StageTrainer, Trainer",
    r"matrix_rate|matrix_share|wait_share": "peak_matmul_flops, mfu, data_wait_fraction",
    r"WeightAverage": "ExponentialMovingAverage",
    r"conclude|stale|_moved": "final_result, epochs_since_best, _to_device",
    r"PictureStore|ResidentPictures|DistantShard": "ImageCache, GpuImageCache, RemoteShard",
    r"View|Placed": "Crop, CropTargets",
    r"seal|sealed": "mark_finished",
    r"Findings|Soundness|judge_findings": "DatasetStats, ValidationReport, validate",
    r"Marks|Node(?=\()": "ImageAnnotation, the JSON reader",
    r"pinned|load_published": "pin_weights, load_pretrained",
    r"explained|bounded|calm": "translated_errors, call_mlflow, silence_mlflow",
    r"SettingsError|MISTAKEN": "InfeasibleConfigError, EXIT_USAGE",
}
PATTERNS = [(re.compile(rf"\b(?:{words})\b", re.I), term) for words, term in PROSE.items()]
PATTERNS += [(re.compile(rf"(?<!\w)(?:{names})(?!\w)"), term) for names, term in NAMES.items()]


def text_files(paths: list[Path]) -> Iterator[Path]:
    """All text files at or below `paths` that the rule covers."""
    for path in paths:
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (
            file
            for file in found
            if file.is_file() and file.suffix in SUFFIXES and file not in EXCLUDED and "__pycache__" not in file.parts
        )


def hits(paths: list[Path]) -> list[str]:
    """Every banned wording in `paths` as "file:line: wording -> standard term"."""
    found = []
    for file in text_files(paths):
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if "# previous name" in line:  # as found on users' disks
                continue
            for pattern, term in PATTERNS:
                found += [f"{file.relative_to(ROOT)}:{number}: {m[0]!r} -> {term}" for m in pattern.finditer(line)]
    return found


def test_wording_uses_standard_terms() -> None:
    top = [path for path in ROOT.iterdir() if path.is_file() and path.name not in ("LICENSE", "constraints.txt")]
    assert hits([ROOT / name for name in SEARCHED] + top) == []


if __name__ == "__main__":
    listed = hits([Path(argument).resolve() for argument in sys.argv[1:]] or [ROOT / name for name in SEARCHED])
    print(*listed, f"{len(listed)} hits", sep="\n")
