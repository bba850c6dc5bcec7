"""Drawings of a batch small enough to check by eye, in letters and in colours."""

from __future__ import annotations

import itertools

import pytest
from drawn_batch import IGNORED, make_batch

from nanopack.batch import Piece
from nanopack.cli.lengths import Bin
from nanopack.cli.text import (
    COLOURS,
    NO_MARK,
    clip,
    draw_histogram,
    draw_rows,
    list_pieces,
    piece_marks,
    row_cells,
    table,
    text_width,
)


def draw(batch, rows=(0, 1), width=80, colour=False):
    return draw_rows(batch, rows, ignore_index=IGNORED, width=width, colour=colour)


def listed(batch, row=0, width=80, colour=False, limit=None):
    return list_pieces(
        batch,
        row,
        where=lambda conversation: f"chats.jsonl:{conversation}",
        text=lambda ids: f"ids {ids[0]} to {ids[-1]}",
        ignore_index=IGNORED,
        width=width,
        colour=colour,
        limit=limit,
    )


def test_letters_show_conversations_trained_tokens_and_padding():
    assert draw(make_batch()) == (
        "col    0         10\n"
        "row 0  aaAAabBBBc..\n"
        "row 1  ............\n"
        "       a letter is a conversation: capital trained, small not trained, . padding; one character is one token"
    )


def test_colours_show_conversations_trained_tokens_and_padding():
    blue, orange, violet = (f"\x1b[38;5;{colour}m" for colour in COLOURS[:3])
    end = "\x1b[0m"
    ruler, row_0, row_1, key = draw(make_batch(), colour=True).split("\n")
    assert ruler == "col    0         10"
    assert row_0 == f"row 0  {blue}▒▒██▒{end}{orange}▒███{end}{violet}▒{end}"
    assert row_1 == "row 1  "
    assert key.strip().startswith("a colour is a conversation: █ trained, ▒ not trained, blank padding")


def test_a_colour_is_another_one_in_the_row_below():
    pieces = ((Piece(0, 0, 4, 0),), (Piece(1, 0, 4, 0),))
    _, row_0, row_1, _ = draw(make_batch(pieces, ("TTTT", "TTTT")), colour=True).split("\n")
    assert row_0.partition("  ")[2] != row_1.partition("  ")[2]


def test_more_conversations_than_colours_never_give_neighbours_the_same():
    pieces = (tuple(Piece(i, i, 1, 0) for i in range(40)),)
    row = draw(make_batch(pieces, ("T" * 40,)), rows=[0], colour=True).split("\n")[1]
    colours = [part.partition("m")[0] for part in row.split("38;5;")[1:]]
    assert len(colours) == 40
    assert all(left != right for left, right in itertools.pairwise(colours))


def test_conversations_too_short_to_show_do_not_take_a_colour():
    # Every character is 8 tokens; conversations 1 to 7 lie behind the second one, and 1 has most of it.
    pieces = (Piece(0, 0, 8, 0), Piece(1, 8, 2, 0), *(Piece(i, 8 + i, 1, 0) for i in range(2, 8)), Piece(8, 16, 8, 0))
    cells = row_cells(make_batch((pieces,), ("T" * 24,)), 0, ignore_index=IGNORED, width=3)
    assert [cell.piece for cell in cells] == [0, 1, 8]
    assert piece_marks(cells) == {0: 0, 1: 1, 8: 2}


def test_a_character_shows_what_most_of_its_tokens_are():
    # Three characters of 4 tokens: half trained is not mostly trained, and only the shown conversation's tokens count.
    batch = make_batch(((Piece(0, 0, 5, 0), Piece(1, 5, 4, 0), Piece(2, 9, 3, 0)),), ("TT....TTT..T",))
    assert draw(batch, rows=[0], width=7 + 3).split("\n")[1] == "row 0  aBc"


@pytest.mark.parametrize("width", [17, 40, 80, 81, 200])
def test_no_line_of_a_row_is_wider_than_the_terminal(width):
    batch = make_batch(((Piece(0, 0, 2048, 0),),), ("T" * 2048,))
    *drawing, key = draw(batch, rows=[0], width=width).split("\n")
    assert max(map(len, drawing)) <= width
    assert f"one character is {-(-2048 // (width - 7))} tokens" in key


def test_ruler_and_rows_stand_under_each_other_however_many_rows_there_are():
    batch = make_batch(((),) * 101, ("." * 12,) * 101)
    ruler, row_9, row_100, _ = draw(batch, rows=[9, 100]).split("\n")
    assert ruler.index("0") == row_9.index(".") == row_100.index(".")


def test_list_names_every_piece_with_place_and_tokens():
    assert listed(make_batch()) == (
        "   conversation    column  tokens  trained  begins\n"
        "a  chats.jsonl:30       0       5        2  ids 0 to 4\n"
        "b  chats.jsonl:10       5       4        3  ... ids 5 to 8\n"
        "c  chats.jsonl:20       9       1        0  ids 9 to 9\n"
        ".  padding             10       2"
    )


def test_list_has_the_colours_of_the_row():
    batch = make_batch(((), (Piece(1, 0, 2, 0), Piece(2, 2, 2, 0))), ("....", "TTTT"))
    row = draw(batch, rows=[0, 1], colour=True).split("\n")[2]
    _, first, second = listed(batch, row=1, colour=True).split("\n")
    colours = [part.partition("m")[0] for part in row.split("38;5;")[1:]]
    assert first.startswith(f"\x1b[38;5;{colours[0]}m██\x1b[0m  chats")
    assert second.startswith(f"\x1b[38;5;{colours[1]}m██\x1b[0m  chats")


def test_list_says_how_many_it_leaves_out():
    lines = listed(make_batch(), limit=1).split("\n")
    assert [line.split()[:3] for line in lines[1:3]] == [["a", "chats.jsonl:30", "0"], ["and", "2", "more"]]


def test_list_says_which_pieces_do_not_show():
    pieces = (tuple(Piece(i, i, 1, 0) for i in range(20)),)
    lines = listed(make_batch(pieces, ("T" * 20,)), width=24).split("\n")
    assert [line[0] for line in lines[1:5]] == ["a", " ", "b", " "]
    assert lines[-1] == NO_MARK


def test_histogram_shows_documents_as_bars_and_shares_of_tokens():
    bins = [Bin(1, 16, 8, 100), Bin(17, 33, 1, 20), Bin(34, None, 0, 0)]
    assert draw_histogram(bins, width=54, colour=False) == (
        "    length  documents            of all tokens\n"
        "    1 - 16          8  ########          83.3%\n"
        "   17 - 33          1  #                 16.7%\n"
        "34 or more          0                     0.0%"
    )


def test_table_sets_numbers_to_the_right():
    rows = [("conversations", "2,486", "packed"), ("", "1", "dropped"), ("ledger", "balanced", "")]
    assert table(rows) == ("conversations     2,486  packed\n                      1  dropped\nledger         balanced")


@pytest.mark.parametrize(
    ("text", "room", "clipped"),
    [
        ("short", 5, "short"),
        ("longer", 5, "lo..."),
        ("two\n  lines\tof text", None, "two lines of text"),
        ("bell \x07 and \x1b[31mred", None, "bell ? and ?[31mred"),
        ("日本語日本語", 9, "日本語..."),
        ("日本語日本語", 8, "日本..."),
    ],
    ids=["fits", "cut", "lines", "control characters", "wide", "wide, odd"],
)
def test_words_of_a_conversation_stay_on_their_line_and_harmless(text, room, clipped):
    assert clip(text, room) == clipped
    assert room is None or text_width(clipped) <= room


def test_words_get_some_room_on_the_narrowest_terminal():
    assert listed(make_batch(), width=20).split("\n")[1].endswith("ids 0 to 4")
