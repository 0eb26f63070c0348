"""A run's identity, name, number of workers and folder."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from crowdray import storage
from crowdray.config import Config, to_json
from crowdray.console.arguments import load_preset
from crowdray.documents import parse_document
from crowdray.errors import UserError
from crowdray.pipeline.identity import Workers, check_name, default_name, open_verified, parse_workers
from crowdray.pipeline.run import RAY_CHECKPOINT_LIST, Run
from crowdray.training.checkpoint import Checkpoint, Progress, save_checkpoint


def test_create_or_verify_of_another_config_or_dataset_raises(run: Run) -> None:
    run.create_or_verify()
    run.create_or_verify()
    for workers in (1, (1, 4)):
        replace(run, identity=replace(run.identity, workers=workers)).create_or_verify()
    memory = replace(run.identity.config.sampling, cache_gib=0, gpu_cache_gib=1.0)
    run.with_config(replace(run.identity.config, sampling=memory)).create_or_verify()
    recorded = parse_document(storage.read_bytes(f"{run.uri}/run.json"))
    del recorded["config"]["optimizer"]["grad_accumulation_steps"]  # written by a version without this field
    storage.write_bytes(f"{run.uri}/run.json", json.dumps(recorded).encode())
    run.create_or_verify()
    recorded["config"]["optimizer"]["accumulate"] = 1  # previous name
    storage.write_bytes(f"{run.uri}/run.json", json.dumps(recorded).encode())
    run.create_or_verify()
    accumulating = replace(run.identity.config.optimizer, grad_accumulation_steps=2)
    with pytest.raises(UserError, match=r"optimizer\.grad_accumulation_steps: recorded 1, given 2"):
        run.with_config(replace(run.identity.config, optimizer=accumulating)).create_or_verify()
    other = replace(run.identity.config, seed=5)
    with pytest.raises(UserError, match=r"another --name.*\n  seed: recorded 0, given 5"):
        run.with_config(other).create_or_verify()
    with pytest.raises(UserError, match=r"digest: recorded \w+, given abc"):
        replace(run, identity=replace(run.identity, data_digest="abc")).create_or_verify()
    assert load_preset(f"{run.uri}/config.json") == run.identity.config


def test_default_name_depends_on_everything_that_is_computed() -> None:
    one, other = to_json(Config()), to_json(Config(seed=1))
    name = default_name("demo", one, "d", 2)
    assert name == default_name("demo", one, "d", 2) and name.startswith("demo-")
    others = [default_name("demo", other, "d", 2), default_name("demo", one, "e", 2), default_name("demo", one, "d", 1)]
    assert len({name, *others, default_name("demo", one, "d", (1, 2))}) == 5
    assert default_name("runs/a/config.json", one, "d", 2).startswith("config-")


@pytest.mark.parametrize("content", ["", '{"checkpoint_results": [{"chec'])
def test_repair_of_a_truncated_checkpoint_list_returns_the_newest_complete_checkpoint(run: Run, content: str) -> None:
    for epoch in (1, 2, 3):
        folder = Path(run.uri, f"checkpoint-{epoch:05d}")
        folder.mkdir(parents=True)
        progress = Progress(1.0, 1.0, run.identity.data_digest, 2, epochs=epoch)
        save_checkpoint(Checkpoint(run.identity.config, progress, {"a": torch.zeros(8)}), folder)
    truncated = Path(run.uri, "checkpoint-00003", "weights.safetensors")
    truncated.write_bytes(truncated.read_bytes()[:-4])
    listed = Path(run.uri, RAY_CHECKPOINT_LIST)
    listed.write_text(content)
    partial = Path(run.uri, f"{storage.PARTIAL}0-checkpoint-00004", "deep")
    partial.mkdir(parents=True)

    assert run.repair() == f"{run.uri}/checkpoint-00002"
    assert not listed.exists() and not partial.parent.exists()
    listed.write_text(json.dumps({}))
    assert run.repair() is None and listed.exists()


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/a", "a\n", "a\x1b[2J", "-a", ".partial-a", "ü" * 101])
def test_check_name_of_no_folder_name_raises(name: str) -> None:
    with pytest.raises(UserError, match=r"--name (is|has) "):
        check_name(name)


@pytest.mark.parametrize("preset", ["debug", "/a/my C#?.json", "s3://b/..json", "-x" * 99])
def test_default_name_of_any_preset_is_a_folder_name(preset: str) -> None:
    check_name(default_name(preset, "computed"))


@pytest.mark.parametrize(("text", "workers"), [(2, 2), ("1:4", (1, 4)), ("3:3", 3)])
def test_parse_workers_of_a_number_or_range(text: int | str, workers: Workers) -> None:
    assert parse_workers(text) == workers


@pytest.mark.parametrize("text", ["0:2", "4:1", "a:b", "1:", ":2", "1:2:3", "-1:2", "1 : 2", "two"])
def test_parse_workers_of_an_invalid_text_raises(text: str) -> None:
    with pytest.raises(UserError, match=f"--workers is '{text}'; give a number, or a minimum of at least 1 and a"):
        parse_workers(text)


def test_open_verified_on_a_node_with_other_files_raises(run: Run) -> None:
    with pytest.raises(UserError, match=rf"{run.uri} on this node is not the folder.*all nodes share"):
        open_verified(run.identity, run.identity_file)
    run.create_or_verify()
    assert open_verified(run.identity, run.identity_file).digest == run.identity.data_digest
    with pytest.raises(
        UserError, match=rf"{run.identity.data} on this node is {run.identity.data_digest[:12]}, .* with eeeeeeeeeeee; "
    ):
        open_verified(replace(run.identity, data_digest="e" * 64), run.identity_file)
