"""Optuna's record of a study's trials: a journal in the study's folder, or a database."""

import os
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from crowdray import storage
from crowdray.credentials import with_credentials
from crowdray.documents import parse_json
from crowdray.errors import UserError, missing_package
from crowdray.tune.study import Study

_FOLDER = "folder"
"""User attribute of an Optuna study in a database: the folder of the study that it belongs to."""


class _WholeLineJournal(JournalFileBackend):
    """A journal without incomplete lines: Optuna would append to one and then read neither line."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        size = self._path.stat().st_size
        try:
            super().append_logs(logs)
        except OSError:
            os.truncate(self._path, size)
            raise


def open_optuna_storage(study: Study) -> BaseStorage:
    """Open the storage of a study's trials; raises UserError where it cannot be opened."""
    if study.options.database is not None:
        try:
            return RDBStorage(with_credentials(study.options.database))
        except ImportError as error:  # Optuna's own has no name
            cause = error.__cause__ or error.__context__
            raise UserError(
                f"--database cannot be used: {missing_package(cause if isinstance(cause, ImportError) else error)}"
            ) from error
        except SQLAlchemyError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"--database cannot be used: {reason}; give a URL such as postgresql://host/optuna"
            ) from error
    if not storage.is_local(study.uri):
        raise UserError(
            f"Optuna's journal cannot be stored in {study.uri}: it is appended line by line, and objects are only "
            "written whole; give --database a URL such as postgresql://..., or --storage a path"
        )
    journal = Path(study.uri) / "journal.log"
    journal.parent.mkdir(parents=True, exist_ok=True)
    if journal.exists() and (content := journal.read_bytes()) and not content.endswith(b"\n"):
        os.truncate(journal, content.rfind(b"\n") + 1)  # half a line after a power cut
    try:
        if journal.exists():
            for line in journal.read_bytes().splitlines():
                parse_json(line)  # Optuna notices an invalid last line only when it reads the next one
        return JournalStorage(_WholeLineJournal(journal))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise UserError(
            f"{journal} is damaged ({type(error).__name__}: {error}); search again under a new --name"
        ) from error


def open_optuna_study(study: Study, opened: BaseStorage | None = None) -> optuna.Study:
    """Open or create the Optuna study.

    Args:
        study: The study.
        opened: Its storage, if it is open already.

    Raises:
        UserError: The database holds a study of this name that belongs to another folder.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trials = optuna.create_study(
        storage=opened or open_optuna_storage(study),
        study_name=study.identity.name,
        directions=["minimize"] * len(study.objectives),
        load_if_exists=True,
    )
    if study.options.database is not None:
        if (folder := trials.user_attrs.get(_FOLDER, study.uri)) != study.uri:
            raise UserError(
                f"the study {study.identity.name} in --database belongs to {folder}, this one is {study.uri}; give "
                "another --name, or the --storage that it was started with"
            )
        trials.set_user_attr(_FOLDER, study.uri)
    return trials


def sampled_trials(trials: optuna.Study) -> list[FrozenTrial]:
    """All trials that have parameters, which enqueued ones do not."""
    return [trial for trial in trials.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]
