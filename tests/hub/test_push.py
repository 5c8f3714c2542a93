"""push_to_hub: what goes up, what is asked for, and that nothing goes up before all was checked. The Hub is a fake."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import COMMIT, Hub, http_error, randomize_branches, tiny
from huggingface_hub import ModelCard, errors

from lite3r_plugin import apply_lite3r, load_lite3r
from lite3r_plugin.errors import CheckpointError, HubError, InputError, NotAppliedError
from lite3r_plugin.hub import push_to_hub

ID = "me/tiny-lite3r"
STATED: dict[str, Any] = {"license": "cc-by-nc-4.0", "base_model": "facebook/VGGT-1B"}
FILES = {"README.md", "lite3r.safetensors", "lite3r_config.json"}


def card_of(hub: Hub) -> ModelCard:
    return ModelCard(hub.files["README.md"].decode())


def test_a_folder_goes_up_in_one_commit(folder: Path) -> None:
    hub = Hub()
    address = push_to_hub(folder, ID, **STATED, api=hub)
    assert address == f"https://huggingface.co/{ID}/commit/{COMMIT}"
    assert [name for name, _ in hub.calls] == ["create_repo", "upload_folder"]
    assert hub.files.keys() == FILES
    assert all(hub.files[name] == (folder / name).read_bytes() for name in FILES - {"README.md"})
    assert [path.name for path in folder.iterdir() if path.name == "README.md"] == []


def test_a_model_goes_up_as_it_would_be_saved(tmp_path: Path) -> None:
    model = apply_lite3r(tiny(), keep_ratio=0.5)
    randomize_branches(model)
    hub = Hub()
    push_to_hub(model, ID, **STATED, api=hub)
    for name, data in hub.files.items():
        (tmp_path / name).write_bytes(data)
    loaded = load_lite3r(tiny(), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
    push_to_hub(model, ID, **STATED, whole=True, api=hub)
    assert json.loads(hub.files["lite3r_config.json"])["whole"]


def test_the_card(folder: Path, metrics: Path, measured: dict[str, Any]) -> None:
    hub = Hub()
    push_to_hub(folder, ID, **STATED, metrics=metrics, api=hub)
    card = card_of(hub)
    data = card.data.to_dict()
    assert (data["license"], data["base_model"], data["library_name"]) == ("cc-by-nc-4.0", "facebook/VGGT-1B", "lite3r-plugin")
    means = {method: measured["means"][method] for method in ("dense", "lite3r")}
    results = {result.metric_name: result for result in card.data.eval_results}
    assert results["AbsRel"].metric_value == means["lite3r"]["AbsRel"]
    assert results["AbsRel"].metric_args["dense"] == means["dense"]["AbsRel"]
    assert "ATE" not in results  # of two views: not defined
    row = next(line for line in card.text.splitlines() if line.startswith("| AbsRel"))
    assert f"| {means['dense']['AbsRel']:.4g} | {means['lite3r']['AbsRel']:.4g} |" in row
    assert row.count("[") == 1  # its interval
    for part in (
        f'load_lite3r(model, "{ID}")', "the linear branches (1)", measured["data"], "device `cpu`", "dtype `float32`", "2 views each",
        "The very files of this repository were measured", '"keep_ratio": 0.5',
    ):  # fmt: skip
        assert part in card.text, part
    for word in ("faster", "speed", " ms", "latency"):
        assert word not in card.text


def test_the_card_says_where_nothing_was_sparse(folder: Path, measured: dict[str, Any]) -> None:
    hub = Hub()
    push_to_hub(folder, ID, **STATED, metrics=measured | {"density": 1.0}, api=hub)
    assert "Nothing was sparse in these runs" in card_of(hub).text


def test_the_card_names_the_protocol(folder: Path, measured: dict[str, Any]) -> None:
    hub = Hub()
    judged = {"protocol": "da3bench", "views": "all views of a scene, at most 100"}
    push_to_hub(folder, ID, **STATED, metrics=measured | judged, api=hub)
    assert "8 scenes, all views of a scene, at most 100 (protocol da3bench)." in card_of(hub).text


def test_the_card_says_nothing_of_the_disk(folder: Path, measured: dict[str, Any]) -> None:
    hub = Hub()
    push_to_hub(folder, ID, **STATED, metrics=measured | {"data": "blendedmvs:/home/somebody/secret/BlendedMVS"}, api=hub)
    assert "`blendedmvs:BlendedMVS`" in card_of(hub).text
    assert b"somebody" not in hub.files["README.md"]


def test_without_metrics_nothing_is_claimed(folder: Path) -> None:
    hub = Hub()
    push_to_hub(folder, ID, **STATED, api=hub)
    assert "Nothing was measured." in card_of(hub).text
    assert card_of(hub).data.eval_results is None


def test_a_base_model_in_words(folder: Path) -> None:
    hub = Hub()
    push_to_hub(folder, ID, license="mit", base_model="the testbed of lite3r-plugin", api=hub)
    assert "Base model: the testbed of lite3r-plugin." in card_of(hub).text
    assert "base_model" not in card_of(hub).data.to_dict()


def test_the_base_model_of_the_metrics(folder: Path, measured: dict[str, Any]) -> None:
    hub = Hub()
    push_to_hub(folder, ID, license="mit", metrics=measured | {"weights": "someone/tiny"}, api=hub)
    assert card_of(hub).data.base_model == "someone/tiny"
    push_to_hub(folder, ID, license="mit", metrics=measured | {"model": "vggt"}, api=hub)
    assert card_of(hub).data.base_model == "facebook/VGGT-1B"


def test_few_scenes_have_no_interval(folder: Path, measured: dict[str, Any]) -> None:
    hub = Hub()
    measured["scenes"] = {method: scores[:5] for method, scores in measured["scenes"].items()}
    push_to_hub(folder, ID, **STATED, metrics=measured, api=hub)
    row = next(line for line in card_of(hub).text.splitlines() if line.startswith("| AbsRel"))
    assert "[" not in row


def test_a_card_in_the_folder_goes_up_as_it_is(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nMine.\n")
    hub = Hub()
    push_to_hub(folder, ID, api=hub)
    assert hub.files["README.md"] == b"---\nlicense: apache-2.0\n---\nMine.\n"
    with pytest.raises(InputError, match=r"goes up as it is: leave out license, base_model"):
        push_to_hub(folder, ID, **STATED, api=Hub())
    for text, message in (("Mine.", "states no licence"), ("---\na: [\n---\n", "cannot be read as a model card")):
        (folder / "README.md").write_text(text)
        with pytest.raises(InputError, match=message):
            push_to_hub(folder, ID, api=Hub())


def test_the_licence_of_the_card_on_the_hub_is_kept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("---\nlicense: apache-2.0\nbase_model:\n- someone/base\n---\nx\n")
    hub = Hub({ID: True}, {ID: str(tmp_path / "card.md")})
    push_to_hub(folder, ID, api=hub)
    assert (card_of(hub).data.license, card_of(hub).data.base_model) == ("apache-2.0", "someone/base")
    push_to_hub(folder, ID, license="mit", api=hub)
    assert card_of(hub).data.license == "mit"


@pytest.mark.parametrize(("private", "made"), [(None, True), (True, True), (False, False)])
def test_a_new_repository_is_private_unless_it_is_said(private: bool | None, made: bool, folder: Path) -> None:
    hub = Hub()
    push_to_hub(folder, ID, **STATED, private=private, api=hub)
    assert dict(hub.calls)["create_repo"] == {"repo_id": ID, "private": made}


@pytest.mark.parametrize("public", [True, False])
def test_a_repository_of_the_other_visibility_is_refused(public: bool, folder: Path) -> None:
    hub = Hub({ID: not public})
    with pytest.raises(HubError, match=f"exists and is {'public' if public else 'private'}"):
        push_to_hub(folder, ID, **STATED, private=public, api=hub)
    assert hub.calls == []
    push_to_hub(folder, ID, **STATED, api=hub)


def test_a_branch(folder: Path) -> None:
    hub = Hub({ID: True})
    push_to_hub(folder, ID, **STATED, revision="keep-0.5", commit_message="Half", api=hub)
    calls = dict(hub.calls)
    assert calls["create_branch"]["branch"] == "keep-0.5"
    assert (calls["upload_folder"]["revision"], calls["upload_folder"]["commit_message"]) == ("keep-0.5", "Half")


# Nothing goes up


def damage(folder: Path) -> None:
    data = bytearray((folder / "lite3r.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "lite3r.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (damage, "damaged or was changed"),
        (lambda f: (f / "lite3r.safetensors").unlink(), "holds no lite3r.safetensors"),
        (lambda f: (f / "lite3r_config.json").write_text("{"), "is damaged"),
        (lambda f: shutil.rmtree(f), "is no folder"),
    ],
)
def test_broken_checkpoints(break_it: Callable[[Path], Any], message: str, folder: Path) -> None:
    break_it(folder)
    hub = Hub()
    with pytest.raises(CheckpointError, match=message):
        push_to_hub(folder, ID, **STATED, api=hub)
    assert hub.calls == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repo_id": "tiny"}, "repo_id is owner/name"),
        ({"repo_id": "me/a--b"}, "repo_id is owner/name"),
        ({"repo_id": 3}, "repo_id is owner/name"),
        ({"license": None}, "no license is known: pass license="),
        ({"license": "Creative Commons"}, "license is what the Hub calls it"),
        ({"base_model": None}, "no base_model is known: pass base_model="),
        ({"base_model": " "}, "base_model is a Hub id"),
        ({"private": "yes"}, "private is True, False or None"),
        ({"revision": "a b"}, "revision is the name of a branch"),
        ({"commit_message": ""}, "commit_message is a text"),
        ({"whole": True}, "whole= says how a model is saved"),
        ({"token": "hf_x"}, "token is for the client"),
        ({"model_or_folder": 3}, "takes a model with Lite3R or a folder"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str, folder: Path) -> None:
    hub = Hub()
    with pytest.raises(InputError, match=message):
        push_to_hub(**{"model_or_folder": folder, "repo_id": ID, "api": hub, **STATED, **arguments})
    assert hub.calls == []


def test_a_dense_model_is_refused() -> None:
    hub = Hub()
    with pytest.raises(NotAppliedError):
        push_to_hub(tiny(), ID, **STATED, api=hub)
    assert hub.calls == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("device"), r"the metrics lack \['device'\]"),
        (lambda m: m.pop("data"), r"lack \['data'\].*what it was measured on"),
        (lambda m: m.update(weights="random"), "random weights"),
        (lambda m: m["config"].update(keep_ratio=0.1), "another configuration: keep_ratio was 0.1, in the checkpoint it is 0.5"),
        (lambda m: m.update(config=3), "their config is no JSON object"),
        (lambda m: m.update(checkpoint="0" * 64), "of another checkpoint"),
        (lambda m: m.pop("checkpoint"), "applied anew, not of this checkpoint"),
        (lambda m: m["means"].pop("dense"), "damaged, or not of `lite3r eval`"),
        (lambda m: m.update(draws=0), "damaged, or not of `lite3r eval`"),
        (lambda m: m.update(density=None), "damaged, or not of `lite3r eval`"),
        (lambda m: m["scenes"]["dense"].pop(), "damaged, or not of `lite3r eval`"),
        (lambda m: m["means"].update(lite3r=dict.fromkeys(m["means"]["lite3r"])), "there is no quality to show"),
    ],
)
def test_metrics_of_something_else(
    change: Callable[[dict[str, Any]], Any], message: str, folder: Path, measured: dict[str, Any], tmp_path: Path
) -> None:
    change(measured)
    (tmp_path / "eval.json").write_text(json.dumps(measured))
    hub = Hub()
    with pytest.raises(InputError, match=message):
        push_to_hub(folder, ID, **STATED, metrics=tmp_path / "eval.json", api=hub)
    assert hub.calls == []


def test_metrics_that_somebody_states(folder: Path, measured: dict[str, Any]) -> None:
    del measured["checkpoint"]
    hub = Hub()
    push_to_hub(folder, ID, **STATED, metrics=measured, api=hub)
    assert "Those who pushed it say so, of a model with this configuration." in card_of(hub).text


@pytest.mark.parametrize(("text", "message"), [("[1]", "what `lite3r eval --json` wrote, got list"), ("{", "cannot be read as metrics")])
def test_metrics_that_are_none(text: str, message: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(InputError, match=message):
        push_to_hub(folder, ID, **STATED, metrics=tmp_path / "eval.json", api=Hub())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(errors.HfHubHTTPError, 401), "you have no right to it; log in with `hf auth login`"),
        (http_error(errors.RepositoryNotFoundError, 401), "log in with `hf auth login`"),
        (http_error(errors.HfHubHTTPError, 403), "you have no right to it"),
        (errors.OfflineModeIsEnabled("offline"), "check the network, HF_HUB_OFFLINE"),
        (ConnectionError("no route"), "check the network"),
        (RuntimeError("boom"), "check the id, the network and your login .*boom"),
    ],
)
def test_a_hub_that_does_not_answer(error: Exception, message: str, folder: Path) -> None:
    hub = Hub()
    hub.fail = error
    with pytest.raises(HubError, match=message):
        push_to_hub(folder, ID, **STATED, api=hub)
    assert hub.calls == []


def test_the_real_client_without_a_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"cannot be looked up on the Hugging Face Hub: .*HF_HUB_OFFLINE"):
        push_to_hub(folder, ID, **STATED)


def test_a_file_in_the_place_of_a_folder(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder"):
        push_to_hub(folder / "lite3r.safetensors", ID, **STATED, api=Hub())
