"""URIs of packages that keep their meaning, and the lineage of a run that starts from one."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from crowdray.config import with_init
from crowdray.data.shards import Dataset
from crowdray.errors import UserError
from crowdray.pipeline.publish import open_run
from crowdray.pipeline.run import plan_run
from crowdray.presets import preset
from crowdray.registry.loading import resolve_uri
from crowdray.registry.packaging import Package
from crowdray.registry.registration import register
from crowdray.registry.tracking import open_tracker

pytestmark = pytest.mark.slow


def test_resolve_uri_of_an_alias_is_its_version_which_becomes_the_lineage_of_a_run(
    store: str, package: Package, discs: Dataset, tmp_path: Path
) -> None:
    run_id = open_tracker(store, "resolution", "a run", "resolved").run_id
    assert run_id is not None
    version = register(package, "crowdray-resolved", run_id, 1, store).uri
    for uri in ("models:/crowdray-resolved@candidate", "models:/crowdray-resolved/latest", version):
        assert resolve_uri(uri, store) == "models:/crowdray-resolved/1"
    assert resolve_uri(f"runs:/{run_id}/model") == f"runs:/{run_id}/model"
    assert resolve_uri(str(package.path)) == resolve_uri(str(package.path.parent)) == str(package.path)

    config = with_init(preset("debug"), "models:/crowdray-resolved@candidate")
    identity = plan_run(config, discs.uri, 1, str(tmp_path), None, "debug", tracking_uri=store).identity
    assert (identity.config.model.init, identity.config.model.init_sha256) == (version, package.weights)
    started = open_run(identity, "discs", store).run_id
    tags = MlflowClient(store, store).get_run(str(started)).data.tags
    assert (tags["crowdray.init"], tags["crowdray.init_weights"]) == (version, package.weights)
    with pytest.raises(UserError, match="there is no model models:/crowdray-resolved@champion at"):
        resolve_uri("models:/crowdray-resolved@champion", store)
