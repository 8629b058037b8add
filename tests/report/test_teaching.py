"""What the page and the cards say of teachers."""

from tests.report.rows import make_rows, q

from llmops.report.card import card
from llmops.report.html import page
from llmops.report.teaching import shared_words

SIGNALS = {"what": "signals", "key": "ab" * 32, "k": 32, "tokens": 4000, "dtype": "float16 log-probabilities",
           "bytes_per_token": 110, "bytes": 440_000, "energy_j": q(300.0, "J"), "wall_s": q(9.0, "s")}
WRITTEN = {"what": "data said", "key": "cd" * 32, "bytes": 900, "energy_j": q(None, "J", method="no sensor"),
           "wall_s": q(1.0, "s"), "counts": {"kept": 80, "written": 100, "prompts": 90}}


def rows():
    made = make_rows()
    first, second = [row for row in made if row.get("building", {}).get("loss")][:2]
    for row, shared in ((first, [SIGNALS]), (second, [SIGNALS, WRITTEN])):
        row["building"] |= {"teaching": {"variant": "tuned", "how": "offline"}, "shared": shared,
                            "teacher_energy_j": q(150.0, "J"),
                            "break_even_to_teacher_tokens": q(2.5e6, "tokens", ci95=(2e6, 3e6))}
    return made, first, second


def test_the_page_names_who_taught_and_each_folder_once():
    made, first, second = rows()
    found = page(made, title="run")
    assert 'id="teaching"' in found and found.count(shared_words(SIGNALS)) == 1
    names = [row["identity"]["variant"] for row in (first, second)]
    assert f"{shared_words(SIGNALS)}; 300 J in all; used by {', '.join(names)}" in found
    assert "from signals on disk" in found and "2.5" in found and "80 rows kept of 100 answers to 90 prompts" in found


def test_a_run_without_teachers_has_no_such_section():
    assert 'id="teaching"' not in page(make_rows(), title="run")


def test_a_card_says_what_the_teacher_cost_and_what_is_shared():
    made, first, _ = rows()
    found = card(first, made)
    assert "of it the teacher's" in found and "150 J" in found and "440,000 bytes" in found
    other = next(row for row in made if row.get("building") and "teaching" not in row["building"])
    assert "the teacher's" not in card(other, made)


def test_shared_folders_are_told_in_words():
    assert shared_words(SIGNALS) == ("signals abababababab: 4,000 trained tokens, top 32 and the rest as float16 "
                                     "log-probabilities, 110 bytes a token, 440,000 bytes")
