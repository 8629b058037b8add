"""Progress: curves of known shapes, lines where there is no terminal, and a picture that leaves a terminal clean."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time

import pytest

from llmops.curves import BRAILLE, LABEL, LOOK, Points, curve_lines, finite, smoothed, thinned
from llmops.progress import Under, Watcher, duration, time_left
from llmops.screen import picture

# ------------------------------------------------------------------------------------------------------------- curves


def falling(count, high=4.0, low=1.0):
    return [(step, high - (high - low) * (step - 1) / (count - 1)) for step in range(1, count + 1)]


def dots(lines):
    """(column, row) of every dot of the picture, in dots from its upper left corner."""
    found = set()
    for row, line in enumerate(lines[:-1]):
        for column, character in enumerate(line[LABEL + 1:]):
            bits = ord(character) - BRAILLE
            if 0 < bits < 256:
                found |= {(2 * column + x, 4 * row + y) for bit, x, y in
                          ((1, 0, 0), (2, 0, 1), (4, 0, 2), (64, 0, 3), (8, 1, 0), (16, 1, 1), (32, 1, 2), (128, 1, 3))
                          if bits & bit}
    return found


def test_a_straight_line_falls_from_corner_to_corner():
    lines = curve_lines(falling(10), [], 30, 6)
    assert len(lines) == 6 and max(map(len, lines)) <= 30
    drawn = dots(lines)
    columns, rows = 2 * (30 - LABEL - 1), 4 * 5
    assert {(0, 0), (columns - 1, rows - 1)} <= drawn
    assert {x for x, _ in drawn} == set(range(columns))  # joined: no column is empty
    for x, y in drawn:
        assert abs(y - x * (rows - 1) / (columns - 1)) <= 1, (x, y)
    assert lines[0].startswith("   4.000│") and lines[4].startswith("   1.000│")
    assert lines[5].strip() == "steps 1 to 10"


def test_a_flat_line_is_flat():
    drawn = dots(curve_lines([(step, 2.0) for step in range(1, 50)], [], 40, 7))
    assert len({y for _, y in drawn}) == 1
    assert drawn and 4 < min(y for _, y in drawn) < 20  # in the middle, not on an edge


def test_looks_are_marked_at_their_step_and_height():
    lines = curve_lines(falling(101, 4.0, 0.0), [(1, 0.0), (51, 4.0), (101, 2.0)], 60, 9)
    columns = 60 - LABEL - 1
    marks = {(column, row) for row, line in enumerate(lines[:-1]) for column, each in enumerate(line[LABEL + 1:])
             if each == LOOK}
    assert marks == {(0, 7), (columns // 2, 0), (columns - 1, 4)}
    assert "held out 2, lowest 0 at 1" in lines[-1]


def test_what_is_not_finite_is_left_out_and_where_there_is_no_room_nothing_is_drawn():
    holed = [(1, 3.0), (2, float("nan")), (3, float("inf")), (4, 1.0)]
    assert curve_lines(holed, [(2, float("nan"))], 40, 6) == curve_lines(finite(holed), [], 40, 6)
    assert curve_lines(falling(9), [], 12, 6) == [] and curve_lines(falling(9), [], 60, 2) == []
    assert curve_lines([(1, 2.0)], [], 60, 6) == [] and curve_lines([], [], 60, 6) == []


@pytest.mark.parametrize("width", [24, 79, 119])
def test_a_long_run_is_thinned_to_the_width(width):
    noisy = [(step, 4.0 - step / 2500 + (0.3 if step % 2 else -0.3)) for step in range(1, 5001)]
    lines = curve_lines(noisy, [], width, 8)
    assert max(map(len, lines)) <= width
    assert {x for x, _ in dots(lines)} == set(range(2 * (width - LABEL - 1)))


def test_plain_is_ascii():
    text = "\n".join(curve_lines(falling(40), [(20, 2.0)], 60, 6, plain=True))
    assert text.isascii() and "*" in text and "o" in text


def test_smoothing_keeps_constants_straight_lines_and_ends_and_quiets_noise():
    assert smoothed([(step, 3.0) for step in range(100)]) == [(step, pytest.approx(3.0)) for step in range(100)]
    line = [(step, float(step)) for step in range(200)]
    for (_, was), (_, found) in list(zip(line, smoothed(line), strict=True))[50:150]:
        assert found == pytest.approx(was, abs=0.5)  # not late
    noise = [(step, (-1.0) ** step) for step in range(400)]
    assert max(abs(value) for _, value in smoothed(noise)[100:300]) < 0.05
    assert smoothed(line[:8]) == line[:8]


def test_thinning_keeps_a_spike_of_one_step_and_both_ends():
    points = [(step, 1.0) for step in range(10_000)]
    points[7_777] = (7_777, 50.0)
    kept = thinned(points, 100)
    assert (7_777, 50.0) in kept and kept[0] == points[0] and kept[-1] == points[-1] and len(kept) <= 130
    assert kept == sorted(kept)
    assert thinned(points[:50], 100) == points[:50]


def test_points_of_any_run_stay_few_and_keep_the_mean():
    points = Points(most=64)
    for step in range(1, 10_001):
        points.add(step, float(step))
    kept = points.all()
    assert len(kept) <= 65 and kept[-1][0] == 10_000
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    assert sum(value for _, value in kept) / len(kept) == pytest.approx(5000, rel=0.05)
    few = Points(most=64)
    for step in range(1, 64):
        few.add(step, float(step))
    assert few.all() == [(step, float(step)) for step in range(1, 64)]


# -------------------------------------------------------------------------------------------------- without a terminal


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def train(watcher, clock, steps=100, each=1.0, tell_from=1):
    for step in range(tell_from, steps + 1):
        clock.now += each
        watcher.progress(step, steps, f"loss {10 / step:.3f}")
        watcher.log(step, {"loss": 10 / step, "tokens": step * 1000.0, "energy_j": step * 5.0,
                           "joules_per_token": 0.005, **({"held_out_loss": 0.5} if step % 50 == 0 else {})})


def test_without_a_terminal_a_line_at_the_start_now_and_then_and_at_the_end(capsys):
    clock = Clock()
    watcher = Watcher(clock=clock)
    with watcher.stage("[1/2] build tuned"):
        train(watcher, clock)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "  [1/2] build tuned",
        "    30 of 100, loss 0.333, 1:10 left", "    60 of 100, loss 0.167, 40.0 s left",
        "    90 of 100, loss 0.111, 10.0 s left",
        "  [1/2] build tuned: done after 1:40; 100 steps, loss 0.1, held-out loss 0.5, 100,000 tokens, 500 J, "
        "5 mJ/token"]
    assert "\x1b" not in err and "\r" not in err


def test_a_stage_that_fails_says_that_it_stopped_and_the_next_begins_anew(capsys):
    clock = Clock()
    watcher = Watcher(clock=clock)
    with pytest.raises(ValueError), watcher.stage("one"):
        train(watcher, clock, steps=3)
        raise ValueError
    with watcher.stage("two"):
        clock.now += 2
    watcher.progress(1, 2)
    watcher.log(1, {"loss": 1.0})  # outside of a stage: nothing
    lines = capsys.readouterr().err.splitlines()
    assert lines[1].startswith("  one: stopped after 3.0 s; 3 steps")
    assert lines[2:] == ["  two", "  two: done after 2.0 s"]


def test_quiet_says_nothing(capsys):
    clock = Clock()
    watcher = Watcher(quiet=True, clock=clock)
    with watcher.stage("one"):
        train(watcher, clock)
        watcher.note("a note")
    assert capsys.readouterr() == ("", "")


def test_the_rest_of_a_resumed_training_is_counted_from_where_it_went_on():
    assert time_left(0, 0, 10, 5.0) is None
    assert time_left(60, 50, 100, 20.0) == pytest.approx(80.0)
    under = Under("t", began=0.0)
    under.count(64, 64, "rows", 10.0)  # another count: the rows of the data
    under.count(50, 100, "", 12.0)
    under.count(60, 100, "", 32.0)
    assert under.left(32.0) == pytest.approx(80.0)


@pytest.mark.parametrize("seconds, text", [(0.0, "0.0 s"), (59.94, "59.9 s"), (60, "1:00"), (187.4, "3:07"),
                                           (3600, "1:00:00"), (7387, "2:03:07")])
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("width", [20, 40, 79, 119])
@pytest.mark.parametrize("rows", [4, 30])
def test_a_picture_fits_its_window(width, rows):
    under = Under("[1/9] build " + "x" * 60, began=0.0)
    for step, value in falling(60):
        under.count(step, 60, "loss 1.234, 12,345 tokens/s, 120 J, 3.2 mJ/token", step)
        under.hear(step, {"loss": value})
    lines = ["".join(text for text, _ in line) for line in picture(under, 60.0, width, rows)]
    assert max(map(len, lines)) <= width and not any(line.endswith(" ") for line in lines)
    assert "60/60" in lines[1] and (len(lines) > 3) == (rows == 30)


# ---------------------------------------------------------------------------------------------------- on a terminal


class Terminal:
    """As much of a terminal as is needed: text, cursor up, erase, colours; lines break anew when it is resized."""

    def __init__(self, width):
        self.width, self.x, self.y, self.cursor, self.styles = width, 0, 0, True, set()
        self.rows, self.broken = [""], [False]  # broken: the row goes on in the next

    def feed(self, text):
        for code, argument, letter, character in re.findall(r"(\x1b\[([?\d;]*)([A-Za-z]))|(.)", text, re.DOTALL):
            if code:
                self.control(argument, letter)
            elif character == "\r":
                self.x = 0
            elif character == "\n":
                self.down(False)
            else:
                if self.x == self.width:
                    self.down(True)
                    self.x = 0
                row = self.rows[self.y].ljust(self.x)
                self.rows[self.y] = row[:self.x] + character + row[self.x + 1:]
                self.x += 1

    def down(self, broken):
        self.broken[self.y] = broken
        self.y += 1
        if self.y == len(self.rows):
            self.rows.append("")
            self.broken.append(False)

    def control(self, argument, letter):
        if letter == "A":
            self.y = max(0, self.y - int(argument or 1))
        elif letter == "K":
            assert argument == "2"
            self.rows[self.y], self.broken[self.y] = "", False
        elif letter == "m":
            self.styles |= set(argument.split(";"))
        else:
            assert argument == "?25" and letter in "hl", (argument, letter)
            self.cursor = letter == "h"

    def resize(self, width):
        assert not any(self.rows[self.y + 1:])  # the cursor stands at the end: that is all that is needed
        del self.rows[self.y + 1:], self.broken[self.y + 1:]
        lines, self.rows, self.broken = self.lines, [], []
        for line in lines:
            parts = [line[at:at + width] for at in range(0, len(line), width)] or [""]
            self.rows += parts
            self.broken += [True] * (len(parts) - 1) + [False]
        self.width, self.y, self.x = width, len(self.rows) - 1, len(self.rows[-1])

    @property
    def lines(self):
        """What was written as one line, however many rows it takes."""
        whole = [""]
        for row, broken in zip(self.rows, self.broken, strict=True):
            whole[-1] += row
            if not broken:
                whole.append("")
        return whole[:-1]

    @property
    def screen(self):
        return [row.rstrip() for row in self.rows if row.strip()]


CHILD = """
import math, sys, time
from llmops.progress import Watcher
watcher = Watcher()
watcher.note("before")
with watcher.stage("[1/2] build tuned: lora r16 3 ep"):
    for step in range(1, 41):
        loss = 3 * math.exp(-step / 15)
        watcher.progress(step, 40, f"loss {loss:.3f}, 12,345 tokens/s, {step * 10} J, 3.2 mJ/token")
        watcher.log(step, {"loss": loss, **({"held_out_loss": loss} if step % 10 == 0 else {})})
        if step == 20:
            watcher.note("a note")
            print("of a library")
        time.sleep(PAUSE)
watcher.note("after")
"""
LEFT_BEHIND = ["before", "a note", "of a library",
               "  [1/2] build tuned: lora r16 3 ep: done after N s; 40 steps, loss 0.2085, held-out loss 0.2085",
               "after"]


def watched(width, resize=None, pause=0.03, **environment):
    """Run CHILD on a pseudo terminal: (the terminal, its screens after every piece that was read)."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    clean = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "LINES", "TERM")}
    child = subprocess.Popen([sys.executable, "-c", CHILD.replace("PAUSE", str(pause))], stdin=slave, stdout=slave,
                             stderr=slave, env={**clean, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8",
                                                "PYTHONPATH": os.pathsep.join(sys.path), **environment})
    os.close(slave)
    terminal, screens, read = Terminal(width), [], b""
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        if not select.select([master], [], [], 0.03)[0]:
            if resize and any("◆" in row for row in terminal.screen):  # between two frames, the picture is there
                terminal.resize(resize)
                fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 40, resize, 0, 0))
                resize = None
            continue
        try:
            read += os.read(master, 65536)
        except OSError:  # what Linux says at the end
            break
        if not read:
            break
        if read[-1] < 128 and not re.search(rb"\x1b[\[?\d;]*\Z", read):  # no character or code is cut in two
            terminal.feed(read.decode())
            screens.append(terminal.screen)
            read = b""
    os.close(master)
    assert child.wait(timeout=30) == 0 and resize is None
    return terminal, screens


def left_behind(terminal):
    return [re.sub(r"after [\d.]+ s", "after N s", line) for line in terminal.lines if line]


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_bar_and_curve_and_is_left_clean(width):
    terminal, screens = watched(width)
    assert left_behind(terminal) == LEFT_BEHIND
    assert terminal.cursor and terminal.x == 0 and not any(terminal.rows[terminal.y:])
    richest = max(screens, key=len)
    picture_of = richest[richest.index("  [1/2] build tuned: lora r16 3 ep"):]
    assert re.search(r"━+─* \d+/40 \d+% [\d.]+ s, [\d.]+ s left", picture_of[1])
    assert re.match(r"  loss [\d.]+, 12,345 tokens/s, \d+ J, 3.2 mJ/token", picture_of[2])
    assert len(picture_of) == 3 + 8 and "◆" in "".join(picture_of[3:10]) and "held out" in picture_of[10]
    assert max(map(len, picture_of)) <= width - 1
    for screen in screens:  # the picture stands there once, never twice
        assert sum(row == "  [1/2] build tuned: lora r16 3 ep" for row in screen) <= 1


def test_a_window_that_becomes_narrower_is_left_clean():
    terminal, screens = watched(120, resize=80, pause=0.06)
    assert left_behind(terminal) == LEFT_BEHIND
    assert max(len(row) for row in max(screens[-6:-1], key=len)) <= 80


def test_a_window_that_becomes_wider_is_left_clean():
    terminal, _ = watched(80, resize=120, pause=0.06)
    assert left_behind(terminal) == LEFT_BEHIND


def test_no_color_has_none():
    terminal, screens = watched(80, NO_COLOR="1")
    assert left_behind(terminal) == LEFT_BEHIND and any("◆" in "".join(screen) for screen in screens)
    assert not {style for style in terminal.styles if re.fullmatch(r"[349]\d|10\d|38|48", style)}
    assert {style for style in watched(80)[0].styles if re.fullmatch(r"3\d", style)}


def test_a_dumb_terminal_gets_lines():
    terminal, _ = watched(80, TERM="dumb", pause=0)
    assert not terminal.styles
    found = left_behind(terminal)
    assert found[:4] == ["before", "  [1/2] build tuned: lora r16 3 ep", "a note", "of a library"]
