"""Finding adapters: entry points are faked; nothing is installed."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from toys import Adapter

from lite3r_plugin import AttentionSite, FusedQKV, hookimpl
from lite3r_plugin.adapter import plugins
from lite3r_plugin.adapter.models import ModelEntry
from lite3r_plugin.adapter.plugins import AdapterWarning, find_sites, get_manager, list_adapters, model_entries
from lite3r_plugin.errors import AdapterError, InputError, UnknownModelError

BUILT_IN = SimpleNamespace(name="lite3r-plugin", version="0.1.0")
FOREIGN = SimpleNamespace(name="their-package", version="3.2")
ANY_MODEL = ModelEntry("m", "a model", nn.Identity, lambda images: None, lambda model, images: None)  # type: ignore[arg-type,return-value]

FAILED = r"the model adapter '{}' \(their-package 3\.2\) failed, and its {} was skipped: "


class Entry:
    """As much of an entry point as the loader uses."""

    def __init__(self, name: str, plugin: Any, dist: Any = BUILT_IN) -> None:
        self.name, self.plugin, self.dist = name, plugin, dist

    def load(self) -> Any:
        if isinstance(self.plugin, BaseException):
            raise self.plugin
        return self.plugin


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Make these the installed adapters."""

    def fake(*entries: Entry) -> None:
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: list(entries) if group == "lite3r.adapters" else [])
        get_manager.cache_clear()

    yield fake
    monkeypatch.undo()
    get_manager.cache_clear()


def adapter(name: str, knows: type[nn.Module] = nn.Module) -> Adapter:
    """An adapter that names one site, called as the adapter itself."""
    return Adapter(lambda model: [AttentionSite(name, "global", 8, FusedQKV(1))] if isinstance(model, knows) else None)


def test_no_adapters_at_all(install: Install) -> None:
    install()
    with pytest.raises(UnknownModelError, match=r"no model adapters are installed: reinstall with `pip install"):
        find_sites(nn.Identity())
    assert list_adapters() == []
    assert model_entries() == {}


def test_an_unknown_model_names_who_was_asked(install: Install) -> None:
    install(Entry("one", adapter("one", nn.Linear)), Entry("two", adapter("two", nn.Conv2d)))
    names = r"knows torch\.nn\.modules\.linear\.Identity \(asked: two, one\)"
    with pytest.raises(UnknownModelError, match=rf"{names}.*inspect_model\(model.*adapters/README\.md"):
        find_sites(nn.Identity())


def test_the_first_answer_wins_and_third_parties_are_asked_first(install: Install) -> None:
    install(Entry("theirs", adapter("theirs", nn.Linear), FOREIGN), Entry("ours", adapter("ours")))
    with pytest.warns(AdapterWarning, match="both know Linear"):
        assert find_sites(nn.Linear(1, 1))[0] == "theirs"
    assert find_sites(nn.Identity())[0] == "ours"
    assert [(a.name, a.distribution, a.version) for a in list_adapters()] == [
        ("theirs", "their-package", "3.2"),
        ("ours", "lite3r-plugin", "0.1.0"),
    ]


def test_general_adapters_are_asked_last_even_of_third_parties(install: Install) -> None:
    class General:
        @hookimpl(trylast=True)
        def lite3r_attention_sites(self, model: nn.Module) -> list[AttentionSite]:
            return []

    install(Entry("general", General(), FOREIGN), Entry("ours", adapter("ours", nn.Linear)))
    assert find_sites(nn.Linear(1, 1))[0] == "ours"
    assert find_sites(nn.Identity()) == ("general", ())


def test_an_adapter_that_cannot_be_imported_is_named_and_the_rest_works(install: Install) -> None:
    install(Entry("broken", ImportError("no module named theirs"), FOREIGN), Entry("ours", adapter("ours")))
    with pytest.warns(AdapterWarning, match=r"'broken' \(their-package 3\.2\) was skipped: ImportError\('no module named theirs'\)"):
        assert find_sites(nn.Identity())[0] == "ours"


def test_a_misspelt_hook_is_reported_and_the_rest_works(install: Install) -> None:
    class Misspelt:
        @hookimpl
        def lite3r_attention_site(self, model: nn.Module) -> None:
            raise AssertionError

    install(Entry("misspelt", Misspelt(), FOREIGN), Entry("ours", adapter("ours")))
    with pytest.warns(AdapterWarning, match=r"'misspelt'.*unknown hook 'lite3r_attention_site'"):
        assert find_sites(nn.Identity())[0] == "ours"
    assert [a.name for a in list_adapters()] == ["ours"]


def test_a_hook_with_a_wrong_argument_is_reported(install: Install) -> None:
    class Wrong:
        @hookimpl
        def lite3r_attention_sites(self, network: nn.Module) -> None:
            raise AssertionError

    install(Entry("wrong", Wrong(), FOREIGN), Entry("ours", adapter("ours")))
    with pytest.warns(AdapterWarning, match=r"'wrong'.*network"):
        assert find_sites(nn.Identity())[0] == "ours"


def test_of_two_adapters_with_one_name_the_built_in_one_stays(install: Install) -> None:
    install(Entry("vggt", adapter("theirs"), FOREIGN), Entry("vggt", adapter("ours")))
    with pytest.warns(AdapterWarning, match=r"'vggt' \(their-package 3\.2\) was skipped: .*registered as 'vggt' already; rename"):
        assert find_sites(nn.Identity())[1][0].fqn == "ours"


def test_an_adapter_that_fails_on_a_model_is_named_and_the_next_is_asked(install: Install) -> None:
    def fail(model: nn.Module) -> None:
        raise KeyError("blocks")

    install(Entry("fails", Adapter(fail), FOREIGN), Entry("ours", adapter("ours")))
    with pytest.warns(AdapterWarning, match=FAILED.format("fails", "lite3r_attention_sites") + "KeyError: 'blocks'"):
        assert find_sites(nn.Identity())[0] == "ours"


@pytest.mark.parametrize("answer", [5, "site", ["site"], {"site": 1}, object(), (site for site in ())])
def test_an_answer_that_is_no_list_of_sites_is_named_and_the_next_is_asked(install: Install, answer: Any) -> None:
    install(Entry("odd", Adapter(lambda model: answer), FOREIGN), Entry("ours", adapter("ours")))
    with pytest.warns(AdapterWarning, match=FAILED.format("odd", "lite3r_attention_sites") + "TypeError: it returned .*AttentionSite"):
        assert find_sites(nn.Identity())[0] == "ours"


def test_an_adapter_that_exits_is_named_and_the_rest_works(install: Install) -> None:
    def leave(*_: object) -> None:
        raise SystemExit(7)

    install(Entry("gone", SystemExit(7), FOREIGN), Entry("leaves", Adapter(leave), FOREIGN), Entry("ours", adapter("ours")))
    with pytest.warns(AdapterWarning) as seen:
        assert find_sites(nn.Identity())[0] == "ours"
    assert ["'gone' (their-package 3.2) was skipped: SystemExit(7)" in str(seen[0].message), len(seen)] == [True, 2]
    assert "'leaves' (their-package 3.2) failed" in str(seen[1].message)


def test_an_interrupt_is_no_failure_of_an_adapter(install: Install) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    install(Entry("ours", Adapter(interrupt)))
    with pytest.raises(KeyboardInterrupt):
        find_sites(nn.Identity())


def test_a_plugin_without_hooks_is_named(install: Install) -> None:
    install(Entry("empty", SimpleNamespace(lite3r_attention_sites=lambda model: []), FOREIGN))
    with pytest.warns(AdapterWarning, match=r"'empty' \(their-package 3\.2\) was skipped: .*none of the hooks; mark them with @hookimpl"):
        assert list_adapters() == []


def test_two_adapters_that_know_one_model_are_named_and_the_first_wins(install: Install) -> None:
    install(Entry("theirs", adapter("theirs"), FOREIGN), Entry("ours", adapter("ours")))
    with pytest.warns(AdapterWarning, match=r"'theirs' \(their-package 3\.2\) and 'ours' \(lite3r-plugin 0\.1\.0\) both know Identity"):
        assert find_sites(nn.Identity())[0] == "theirs"


def test_a_second_adapter_that_refuses_the_model_knows_it(install: Install) -> None:
    def refuse(model: nn.Module) -> None:
        raise AdapterError("not this one")

    install(Entry("theirs", adapter("theirs"), FOREIGN), Entry("ours", Adapter(refuse)))
    with pytest.warns(AdapterWarning, match="both know Identity"):
        assert find_sites(nn.Identity())[0] == "theirs"


def test_an_adapters_own_refusal_reaches_the_user(install: Install) -> None:
    def refuse(model: nn.Module) -> None:
        raise AdapterError("this model must be built with sdpa")

    install(Entry("refuses", Adapter(refuse), FOREIGN), Entry("ours", adapter("ours")))
    with pytest.raises(AdapterError, match=r"'refuses' \(their-package 3\.2\): this model must be built with sdpa"):
        find_sites(nn.Identity())


def test_a_third_partys_model_entry_wins(install: Install) -> None:
    theirs, ours = (Models(lambda summary=who: {"m": dataclasses.replace(ANY_MODEL, summary=summary)}) for who in ("theirs", "ours"))
    install(Entry("theirs", theirs, FOREIGN), Entry("ours", ours))
    both = r"'theirs' \(their-package 3\.2\) and 'ours' \(lite3r-plugin 0\.1\.0\) both build a model called 'm'"
    with pytest.warns(AdapterWarning, match=both):
        assert model_entries()["m"].summary == "theirs"


class Models:
    """A plugin whose hook for models does as it is told."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self.answer = answer

    @hookimpl
    def lite3r_models(self) -> Any:
        return self.answer()


def raising(error: BaseException) -> Callable[[], Any]:
    def answer() -> Any:
        raise error

    return answer


BAD_MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "raises": (raising(RuntimeError("boom")), "RuntimeError: boom"),
    "refuses": (raising(InputError("not today")), "InputError: not today"),
    "exits": (raising(SystemExit(7)), "SystemExit: 7"),
    "nothing": (lambda: None, "it returned NoneType, not a dict of ModelEntry by name"),
    "no mapping": (lambda: [ANY_MODEL], "it returned list, not a dict of ModelEntry by name"),
    "no entry": (lambda: {"m": 5}, "it returned int for 'm', not a ModelEntry for a name"),
    "no name": (lambda: {5: ANY_MODEL}, "it returned ModelEntry for 5, not a ModelEntry for a name"),
    "a wrong entry": (lambda: {"m": dataclasses.replace(ANY_MODEL, create=None)}, "create"),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_models_of_a_broken_adapter_are_skipped_and_it_is_named(install: Install, kind: str) -> None:
    answer, reason = BAD_MODELS[kind]
    install(Entry("odd", Models(answer), FOREIGN), Entry("ours", Models(lambda: {"m": ANY_MODEL})))
    for ask in (model_entries, list_adapters, lambda: plugins.find_model("m")):
        with pytest.warns(AdapterWarning, match=FAILED.format("odd", "lite3r_models") + f".*{reason}") as seen:
            ask()
        assert len(seen) == 1
    with pytest.warns(AdapterWarning):
        assert model_entries() == {"m": ANY_MODEL}


def test_a_hook_may_take_fewer_arguments(install: Install) -> None:
    class Anything:
        @hookimpl
        def lite3r_attention_sites(self) -> list[AttentionSite]:
            return []

    install(Entry("anything", Anything()))
    assert find_sites(nn.Identity()) == ("anything", ())


def test_adapters_that_only_build_models_are_listed_last(install: Install) -> None:
    class Both(Adapter):
        """Finds and builds.

        In all the ways there are.
        """

        @hookimpl
        def lite3r_models(self) -> dict[str, ModelEntry]:
            return {"small": ANY_MODEL, "large": ANY_MODEL}

    class Builder:
        @hookimpl
        def lite3r_models(self) -> dict[str, ModelEntry]:
            return {"theirs": ANY_MODEL}

    install(Entry("builder", Builder(), FOREIGN), Entry("both", Both(lambda model: None)), Entry("finder", adapter("finder")))
    assert [(a.name, a.models) for a in list_adapters()] == [("finder", ()), ("both", ("small", "large")), ("builder", ("theirs",))]
    assert list_adapters()[1].summary == "Finds and builds."


def test_a_misspelt_hook_leaves_nothing_of_its_plugin(install: Install) -> None:
    class Misspelt(Adapter):
        @hookimpl
        def lite3r_optimise(self, model: nn.Module) -> None:
            raise AssertionError

    install(Entry("misspelt", Misspelt(lambda model: []), FOREIGN), Entry("ours", adapter("ours")))
    with pytest.warns(AdapterWarning, match=r"'misspelt'.*unknown hook 'lite3r_optimise'"):
        assert find_sites(nn.Identity())[0] == "ours"
    assert [a.name for a in list_adapters()] == ["ours"]


def test_every_family_is_one_adapter_with_all_its_hooks() -> None:
    get_manager.cache_clear()
    names = {
        e.name
        for e in importlib.metadata.entry_points(group="lite3r.adapters")
        if e.dist is not None and e.dist.name == plugins.DISTRIBUTION
    }
    assert names == {
        "vggt", "depth_anything_3", "pi3", "timm", "transformers", "testbed", "vggt_omega", "streamvggt", "stream3r", "croco", "fast3r",
        "mapanything", "dinov2",
    }  # fmt: skip
    models = {a.name: a.models for a in list_adapters() if a.distribution == plugins.DISTRIBUTION}
    assert models.keys() == names
    assert all(models[name] == (name,) for name in ("vggt", "pi3", "testbed", "fast3r", "mapanything"))
    assert "da3-small" in models["depth_anything_3"]
    assert {i.plugin_name for i in get_manager().hook.lite3r_exact_rewrites.get_hookimpls()} == {
        "vggt", "depth_anything_3", "pi3", "timm", "transformers", "dinov2",
    }  # fmt: skip


def test_general_families_are_asked_last() -> None:
    asked = [a.name for a in list_adapters()]
    assert max(asked.index(name) for name in ("vggt", "depth_anything_3", "pi3")) < min(
        asked.index(n) for n in ("timm", "transformers", "dinov2")
    )
