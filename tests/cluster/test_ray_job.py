"""What a submitted Ray job may not miss, and what is sent to a cluster."""

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus

from crowdray.cluster.ray_job import check_shared
from crowdray.cluster.runtime import PACKAGE
from crowdray.cluster.submit import SubmittedJob
from crowdray.cluster.submit import submit as start_job
from crowdray.console.arguments import PROGRAM, program
from crowdray.console.commands import submit, train, tune
from crowdray.credentials import hidden
from crowdray.errors import JobFailed, UserError

JOB, SERVER = "RAY_JOB_CONFIG_JSON_ENV_VAR", "http://127.0.0.1:5000"
TRAIN = ["--preset", "debug", "--data", "s3://bucket/data", "--storage", "/shared/runs"]


def test_check_shared_lists_every_problem_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError) as caught:
        check_shared({"--data": "data/mall", "--storage": "runs", "--json": "/a/b.json"}, tracked=True, fix="")
    message = str(caught.value)
    assert all(text in message for text in ("MLFLOW_TRACKING_URI is not set", "--data data/mall", "--storage runs"))
    assert "--json" not in message and message.count("\n") == 3


@pytest.mark.parametrize(
    ("uri", "accepted"),
    [(SERVER, True), ("sqlite:////shared/mlflow.db", True), ("sqlite:///mlflow.db", False), ("mlruns", False)],
)
def test_check_shared_requires_a_tracking_uri_that_outlives_the_job(
    uri: str, accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    if accepted:
        check_shared({}, tracked=True, fix="")
    else:
        with pytest.raises(UserError, match=f"MLFLOW_TRACKING_URI {uri} is relative"):
            check_shared({}, tracked=True, fix="")


@pytest.mark.parametrize(("command", "more"), [(train, []), (tune, ["--trials", "2"])])
def test_training_in_a_ray_job_stops_unless_ephemeral(
    command: object, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parse = command.parse_arguments  # type: ignore[attr-defined]
    relative = ["--preset", "debug", "--data", "data/x", *more]
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    parse(relative)  # not a Ray job
    monkeypatch.setenv(JOB, "{}")
    with pytest.raises(UserError, match=r"--data data/x is relative(.|\n)*--storage runs(.|\n)*--ephemeral"):
        parse(relative)
    assert parse([*relative, "--ephemeral"]).data == "data/x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SERVER)
    parse([*TRAIN, *more])


def test_hints_of_a_submitted_job_are_commands_of_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOB, "{}")
    assert program("predict") == "jobs/predict.py"
    monkeypatch.setenv(PROGRAM, "/home/me/.venv/bin/crowdray NAME")
    assert program("predict") == "/home/me/.venv/bin/crowdray predict"


def submitted(
    arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[set[str], list[str], dict[str, str]]:
    """Files, command and variables that a submission from `folder` would send."""
    found: list[tuple[set[str], list[str], dict[str, str]]] = []

    class Client:
        def __init__(self, address: str) -> None:
            assert address == "http://head:8265"

        def submit_job(self, entrypoint: str, runtime_env: dict[str, object]) -> str:
            stage = Path(str(runtime_env["working_dir"]))
            names = {str(path.relative_to(stage)) for path in stage.rglob("*") if path.is_file()}
            variables = runtime_env["env_vars"]
            assert isinstance(variables, dict)
            found.append((names, entrypoint.split(), variables))
            return "id"

    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Client)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    submit.main(["--address", "http://head:8265", "--no-wait", *arguments])
    return found[0]


def test_submit_sends_the_package_and_what_the_arguments_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (".env", ".git/config", "data/shard.arrow", "notes.py", "space.json", "thin.py", "runs/a/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SERVER)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    command = [
        "tune",
        *TRAIN,
        "--trials",
        "2",
        "--space=space.json",
        "--json",
        "/shared/a.json",
        "--model.backbone",
        "thin:Thin",
    ]
    names, entrypoint, variables = submitted(command, tmp_path, monkeypatch)
    files = (*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.jinja"))
    package = {str(Path("crowdray") / path.relative_to(PACKAGE)) for path in files}
    assert names == package | {"crowdray/py.typed", "space.json", "thin.py"}
    assert entrypoint == ["python", "-m", "crowdray.console.main", *command]
    assert set(variables) == {"MLFLOW_TRACKING_URI", PROGRAM, "CROWDRAY_GIT_REVISION"}
    assert variables["MLFLOW_TRACKING_URI"] == SERVER and len(variables["CROWDRAY_GIT_REVISION"]) >= 40
    printed = capsys.readouterr().out
    assert "submitted id to http://head:8265" in printed
    assert all(f"ray job {verb}" in printed for verb in ("logs --follow", "stop"))


@pytest.mark.parametrize("variable", [False, True])
def test_submit_refuses_credentials(variable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crowdray.credentials.hidden", hidden)
    uri = "https://me:secret-password@host/mlflow"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri if variable else SERVER)
    monkeypatch.setitem(hidden, "s3://bucket", ("key:secret-password", "")) if not variable else None
    try:
        with pytest.raises(UserError, match="dashboard") as caught:
            submitted(["train", *TRAIN], tmp_path, monkeypatch)
    finally:
        hidden.clear()
    assert "secret-password" not in str(caught.value)


def test_submit_checks_the_command_before_it_sends_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SERVER)
    with pytest.raises(UserError, match="--dest data is relative"):
        submitted(["convert", "synthetic", "--dest", "data"], tmp_path, monkeypatch)
    with pytest.raises(UserError, match="unknown preset 'demmo'"):
        submitted(["train", "--preset", "demmo", *TRAIN[2:]], tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("error", "message"),
    [(ConnectionError("no route."), "no route; give --address"), (AuthenticationError("401"), "RAY_AUTH_MODE=token")],
)
def test_submit_explains_why_a_cluster_does_not_accept_jobs(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Mock(side_effect=error))
    with pytest.raises(UserError, match=message):
        start_job(["train"], "http://head:8265", variables={})


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", None, "is failed"), ("STOPPED", None, "is stopped")],
)
def test_follow_returns_the_status_of_the_job(status: str, code: int | None, expected: int | str) -> None:
    async def lines(job: str) -> AsyncIterator[str]:
        yield f"a line of {job}\n"

    client, printed = Mock(tail_job_logs=lines), list[str]()
    client.get_job_info.return_value = SimpleNamespace(
        status=JobStatus(status), driver_exit_code=code, message="because"
    )
    job = SubmittedJob(client, "job1")
    if isinstance(expected, int):
        assert job.follow(printed.append) == expected
    else:
        with pytest.raises(JobFailed, match=f"job1 {expected}: because"):
            job.follow(printed.append)
    assert printed == ["a line of job1\n"]
    client.get_job_info.side_effect = RuntimeError("closed")
    with pytest.raises(JobFailed, match=r"does not answer any more \(closed\); job1 may run on"):
        job.follow(printed.append)
