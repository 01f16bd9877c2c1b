"""`t5x settings` and `t5x list`: what they print for a word, and for one that nothing has."""

import pytest

from codellm_jax.reference.printed import listing, settings_page
from codellm_jax.reference.registries import REGISTRIES
from codellm_jax.reference.settings import settings


def test_all_settings_are_listed():
    listed = {line.split()[0] for line in settings_page(None).splitlines() if line}
    assert {one.name for one in settings()} <= listed


def test_a_setting_is_found_by_its_name_in_any_case():
    page = settings_page("code_rate")
    assert page.splitlines()[0] == "CODE_RATE  (float | None)"
    assert "value of mixture.code_rate" in page
    assert "0.333333333333 in" in page and "gin/mixed_pretrain.gin:8" in page
    assert "BATCH_SIZE" not in page


def test_a_word_of_a_meaning_finds_settings():
    assert settings_page("gradient").count("taken by") > 0
    assert all("gradient" in part.lower() for part in settings_page("gradient").split("\n\n"))


def test_a_slip_gets_the_nearest_names():
    with pytest.raises(ValueError, match="no setting is named 'batchsize' or speaks of it; nearest: .*BATCH_SIZE"):
        settings_page("batchsize")
    with pytest.raises(ValueError, match="t5x settings lists all"):
        settings_page("qqqq")
    with pytest.raises(ValueError, match="nothing of the kind 'modles' is listed; nearest: models"):
        listing("modles")


@pytest.mark.parametrize("kind", ["models", "schedules", "benchmarks", "studies", "corpora"])
def test_each_entry_is_printed_with_what_it_is(kind):
    text = " ".join(listing(kind).split())
    for entry in REGISTRIES[kind].entries():
        assert entry.name in text and " ".join(entry.description.split())[:25] in text


def test_without_a_kind_the_kinds_are_listed():
    assert {line.split()[0] for line in listing(None).splitlines()[:-2]} == set(REGISTRIES)
