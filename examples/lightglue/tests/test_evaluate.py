"""`evaluate.py`: which settings it measures."""

import pytest


@pytest.fixture
def evaluate():
    return pytest.importorskip("evaluate", reason="needs the extra 'evaluate'")


def test_settings_are_every_combination_that_there_is(evaluate):
    args = evaluate.parse(["folder", "--blocks", "32", "--keep", "0.25", "--block-choices", "mean", "error", "--fp8"])
    sparse = [(True, "mean"), (True, "error"), (False, "mean")]  # choosing by error needs block means
    expected = [evaluate.Setting(), *(evaluate.Setting(0.25, 32, *rest) for rest in sparse)]
    settings = evaluate.settings_of(args)
    assert settings[:4] == expected
    assert [(s.keep_ratio, s.block_means, s.block_choice, s.fp8) for s in settings[4:]] == [
        (s.keep_ratio, s.block_means, s.block_choice, True) for s in expected
    ]


def test_a_file_that_cannot_be_written_is_refused_before_measuring(evaluate, tmp_path):
    from lite3r_plugin.errors import InputError

    with pytest.raises(InputError, match=r"must end in \.json"):
        evaluate.main([str(tmp_path), "--json", str(tmp_path / "results.txt")])
