"""Nothing in a package runs when it is loaded, wherever it was put and wherever the package comes from."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from crowdray import storage
from crowdray.errors import UserError
from crowdray.registry.loading import load_counter
from crowdray.registry.packaging import Package
from crowdray.registry.program_schema import check_guard, check_size
from crowdray.registry.registration import register
from crowdray.registry.tracking import open_tracker

from ..support.counters import photo

CANARY = "canary"
"""File in the working directory that each attack would create."""
CODE = f"__import__('pathlib').Path('{CANARY}').touch()"
PROGRAM = "models/model.json"
EXAMPLE = "data/sample_inputs/model.pt"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"

Members = dict[str, bytes]


class Payload:
    """Creates the canary when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"import pathlib; pathlib.Path('{CANARY}').touch()",)


def edited(member: str, edit: Callable[[Any], None]) -> Callable[[Members], None]:
    """An attack that edits the JSON of a member."""

    def attack(members: Members) -> None:
        content = json.loads(members[member])
        edit(content)
        members[member] = json.dumps(content).encode()

    return attack


def on_graph(edit: Callable[[Any], None]) -> Callable[[Members], None]:
    return edited(PROGRAM, lambda program: edit(program["graph_module"]["graph"]))


def set_size_expression(graph: Any) -> None:
    sizes = next(iter(graph["sym_int_values"].values()))
    sizes["as_expr"] = {"expr_str": CODE, "hint": None}


def rename(graph: Any, name: str) -> None:
    """Give a value of the graph a name that would end the line of generated code."""
    text = json.dumps(graph).replace('"image"', json.dumps(name))
    graph.clear()
    graph.update(json.loads(text))


def add_node(target: str, **arguments: Any) -> Callable[[Members], None]:
    """An attack that calls an operator on the image, with arguments by name, before all others."""

    def insert(graph: Any) -> None:
        inputs = [{"name": name, "arg": value, "kind": 1} for name, value in arguments.items()]
        graph["nodes"].insert(0, {**graph["nodes"][0], "target": target, "inputs": inputs, "name": "attack"})

    return on_graph(insert)


IMAGE = {"as_tensor": {"name": "image"}}


def product_of_products(graph: Any) -> None:
    """Square a size eight times."""
    node, last = graph["nodes"][0], graph["nodes"][0]["name"]
    for number in range(8):
        factors = [{"name": name, "arg": {"as_sym_int": {"as_name": last}}, "kind": 1} for name in ("a", "b")]
        last = f"square_{number}"
        output = [{"as_sym_int": {"as_name": last}}]
        graph["nodes"].insert(
            1 + number,
            {**node, "target": "_operator.mul", "inputs": factors, "outputs": output, "name": last},
        )


def call_signature(program: Any) -> Any:
    return program["graph_module"]["module_call_graph"][0]["signature"]


def pickled_weight(config: Any) -> None:
    next(iter(config["config"].values()))["use_pickle"] = True


def opaque_constant(members: Members) -> None:
    config = json.loads(members[CONSTANTS])
    first = next(iter(config["config"].values()))
    first.update(path_name="opaque_obj_0", use_pickle=True, tensor_meta=None)
    members[CONSTANTS] = json.dumps(config).encode()
    members["data/constants/opaque_obj_0"] = pickle.dumps(Payload())


def legacy_weights(members: Members) -> None:
    members["data/weights/model.pt"] = pickle.dumps(Payload())
    del members[WEIGHTS]


def pickled_member(members: Members) -> None:
    for member in [name for name in members if "weight_" in name]:
        members[member] = pickle.dumps(Payload())
    edited(WEIGHTS, pickled_weight)(members)


ATTACKS = {
    "expression": on_graph(set_size_expression),
    "guard": edited(PROGRAM, lambda program: program["guards_code"].append(CODE)),
    "guard on the size": edited(
        PROGRAM, lambda program: program["guards_code"].append(f"L['image'].size()[2] > 0 or {CODE}")
    ),
    "name": on_graph(lambda graph: rename(graph, f"image={CODE}")),
    "argument name": edited(
        PROGRAM, lambda program: call_signature(program).update(forward_arg_names=[f"image={CODE}"])
    ),
    "input structure": edited(
        PROGRAM, lambda program: call_signature(program).update(in_spec='[1, {"type": "collections.namedtuple"}]')
    ),
    "operator that reads a file": on_graph(
        lambda graph: graph["nodes"][0].update(target="torch.ops.aten.from_file.default")
    ),
    "function of torch": on_graph(lambda graph: graph["nodes"][0].update(target="torch.hub.load")),
    "operator extension": on_graph(lambda graph: graph["nodes"][0].update(target="#x:y")),
    "pickled weight": pickled_member,
    "pickled constant": opaque_constant,
    "legacy weights": legacy_weights,
    "unknown field": edited(PROGRAM, lambda program: program.update(code=CODE)),
    "size beyond the stored bytes": edited(
        WEIGHTS,
        lambda config: next(iter(config["config"].values()))["tensor_meta"]["sizes"][0].update(as_int=2**39),
    ),
    "stored values used twice": edited(
        WEIGHTS,
        lambda config: next(iter(config["config"].values()))["tensor_meta"].update(
            sizes=[{"as_int": 2**10}] * 4, strides=[{"as_int": 0}] * 4
        ),
    ),
    "operator that writes out of bounds": add_node(
        "torch.ops.aten.repeat_interleave.self_Tensor", self=IMAGE, repeats=IMAGE
    ),
    "operator that divides by zero": add_node("torch.ops.aten.remainder.int", a={"as_int": 4}, b={"as_int": 0}),
    "operator that writes its result": add_node("torch.ops.aten.max.dim_max", self=IMAGE, dim={"as_int": 0}),
    "memory format as a number": add_node("torch.ops.aten.clone.default", self=IMAGE, memory_format={"as_int": 4}),
    "memory format under another name": add_node("torch.ops.aten.clone.default", self=IMAGE, x={"as_int": 4}),
    "sizes that overflow": add_node("torch.ops.aten.pad.default", self=IMAGE, pad={"as_ints": [2**62] * 4}),
    "resizing to a fraction": add_node(
        "torch.ops.aten.upsample_nearest2d.default",
        input=IMAGE,
        output_size={"as_ints": [9, 9]},
        scales_h={"as_float": 1e-30},
        scales_w={"as_float": 1e-30},
    ),
    "arithmetic on text": add_node("_operator.mul", a={"as_string": "x"}, b={"as_int": 2**20}),
    "product of products": on_graph(product_of_products),
    "deep nesting": lambda members: members.update({PROGRAM: b"[" * 200_000}),
}


def attacked(package: Package, folder: Path, attack: Callable[[Members], None]) -> Path:
    """A copy of a package after an attack on the members of its archive."""
    shutil.copytree(package.path, folder)
    path = folder / "data/model.pt2"
    with zipfile.ZipFile(path) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    attack(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"model/{name}", content)
    return folder


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_load_counter_of_an_attacked_program_raises_and_runs_nothing(
    attack: Callable[[Members], None], package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = attacked(package, tmp_path / "model", attack)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_counter(str(folder))
    assert not Path(CANARY).exists()


def test_load_counter_ignores_example_inputs_and_metadata(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def attack(members: Members) -> None:
        members[EXAMPLE] = pickle.dumps(Payload())
        on_graph(lambda graph: graph["nodes"][0].update(metadata={"torch_fn": CODE, "from_node": CODE}))(members)

    counter = load_counter(str(attacked(package, tmp_path / "model", attack)))
    torch.testing.assert_close(counter(package.example), package.density)
    assert not Path(CANARY).exists()


def test_load_counter_with_code_beside_the_program_raises_and_imports_nothing(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(package.path, folder)
    (folder / "code").mkdir()
    (folder / "code/counting_code.py").write_text(CODE)
    (folder / "data/pickle_module_info.txt").write_text("counting_code")
    (folder / "data/model.pth").write_bytes(pickle.dumps(Payload()))
    description = (folder / "MLmodel").read_text()
    (folder / "MLmodel").write_text(description.replace("code: null", "code: code"))
    with pytest.raises(UserError, match="names Python code"):
        load_counter(str(folder))
    assert not Path(CANARY).exists()


@pytest.mark.parametrize(
    "description",
    [
        "a: [",
        "[" * 100_000,
        "a: &a [1]\nb: [*a]",
        "x: !!int ''",
        "flavors: {pytorch: abc}",
        "flavors: 1",
        "a: !!python/object/apply:os.system [touch canary]",
        "x" * 300_000,
    ],
)
def test_load_counter_with_an_invalid_description_raises(
    description: str, package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(package.path, folder)
    (folder / "MLmodel").write_text(description)
    with pytest.raises(UserError, match="MLmodel"):
        load_counter(str(folder))
    assert not Path(CANARY).exists()


@pytest.mark.slow
@pytest.mark.parametrize("attack", [ATTACKS["expression"], ATTACKS["guard"], ATTACKS["pickled weight"]])
def test_load_counter_of_an_attacked_program_from_a_registry_or_a_remote_folder_runs_nothing(
    attack: Callable[[Members], None], package: Package, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = attacked(package, tmp_path / "model", attack)
    remote = f"memory://attacked/{tmp_path.name}"
    storage.publish_directory(folder, remote, last="MLmodel")
    tracker = open_tracker(store, "attacks", "a run", tmp_path.name)
    assert tracker.run_id is not None
    version = register(package, tmp_path.name, tracker.run_id, 0, store)
    client = MlflowClient(store, store)
    outputs = client.get_run(tracker.run_id).outputs
    assert outputs is not None
    model = client.get_logged_model(outputs.model_outputs[0].model_id)
    registered = Path(storage.resolve(model.artifact_location))
    shutil.copy(folder / "data/model.pt2", registered / "data/model.pt2")
    for uri in (remote, version.uri):
        with pytest.raises(UserError, match="cannot be loaded"):
            load_counter(uri, tracking_uri=store)
    assert not Path(CANARY).exists()


def test_load_counter_returns_the_exported_density(package: Package) -> None:
    loaded, exported = load_counter(str(package.path)), torch.export.load(package.path / "data/model.pt2").module()
    image = photo(1, 50, 97)
    with torch.inference_mode():
        assert torch.equal(loaded(image), exported(image))


@pytest.mark.parametrize("name", ["MLmodel", "data/model.pt2"])
@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_load_counter_of_another_kind_of_file_raises(package: Package, tmp_path: Path, name: str, kind: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(package.path, folder)
    path = folder / name
    path.unlink()
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_counter(str(folder))


S = "Symbol('s6', positive=True, integer=True)"


@pytest.mark.parametrize(
    "text", [S, "Integer(3)", f"Add({S}, Integer(-1))", f"FloorDiv(Mul({S}, Integer(2)), Max({S}, Integer(1)))"]
)
def test_check_size_accepts_integer_arithmetic(text: str) -> None:
    assert check_size(text) == text


@pytest.mark.parametrize(
    "text",
    [
        CODE, "Symbol(S)", "Symbol('__import__')", f"Add(*[{S}])", f"Symbol('s6', positive={CODE})", "Lambda(x, x)",
        "Add.mro()", "(Add)(print)(1)", "", "Integer(" + "9" * 30_000 + ")", f"Add({S}, evaluate=False)", "f'{1}'",
    ],
)  # fmt: skip
def test_check_size_rejects_anything_else(text: str) -> None:
    with pytest.raises(ValueError, match="in a shape is not allowed"):
        check_size(text)


@pytest.mark.parametrize(
    "text",
    ["L['image'].size()[2] >= 5", "1 + (((-1) + L['image'].size()[3]) // 2) > 1",
     "max(1, L['image'].size()[2] % 16) != 1 and (L['image'].size()[0] == 1 or not 2 < 1)"],
)  # fmt: skip
def test_check_guard_accepts_comparisons_of_sizes(text: str) -> None:
    assert check_guard(text) == text


@pytest.mark.parametrize(
    "text",
    [
        CODE, f"L['image'].size()[2] > 0 or {CODE}", "L['image'].storage()", "L['x'].size()[2]", "args[0]", "2 ** 9",
        "L['image'].size()[2] >= 5.0", "'a'", "f'{1}'", "(lambda: 1)()", "[x for x in (1,)]", "max(1, key=print)",
        "max()",
        "max(*L)", "1 if 1 else 2", "1\n  import os", "1) or (1", "{}", "...", "print",
    ],
)  # fmt: skip
def test_check_guard_rejects_anything_else(text: str) -> None:
    with pytest.raises(ValueError, match=r"guard is not allowed|is not an expression|plain text"):
        check_guard(text)
