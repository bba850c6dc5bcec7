"""Drawings of a batch small enough to check by eye, in letters and in colours."""

from __future__ import annotations

import itertools

import pytest
from drawn_batch import IGNORED, make_batch
from rich.cells import cell_len

from nanopack.batch import Piece
from nanopack.cli.lengths import Bin
from nanopack.cli.text import (
    COLOURS,
    NO_MARK,
    clip,
    columns,
    draw_histogram,
    draw_losses,
    draw_rows,
    list_pieces,
    piece_marks,
    printable,
    row_cells,
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


def test_letters_show_conversations_tokens_in_the_loss_and_padding():
    assert draw(make_batch()) == (
        "col    0         10\n"
        "row 0  aaAAabBBBc..\n"
        "row 1  ............\n"
        "       a letter is a conversation: capital in the loss, small not, . padding; one character is one token"
    )


def test_colours_show_conversations_tokens_in_the_loss_and_padding():
    blue, orange, violet = (f"\x1b[38;5;{colour}m" for colour in COLOURS[:3])
    end = "\x1b[0m"
    ruler, row_0, row_1, key = draw(make_batch(), colour=True).split("\n")
    assert ruler == "col    0         10"
    assert row_0 == f"row 0  {blue}▒▒██▒{end}{orange}▒███{end}{violet}▒{end}"
    assert row_1 == "row 1"
    assert key.strip().startswith("a colour is a conversation: █ in the loss, ▒ not, blank padding")


def test_colours_differ_from_those_of_the_row_above():
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
    # every character is 8 tokens; conversations 1 to 7 share the second one, and 1 has most of it
    pieces = (Piece(0, 0, 8, 0), Piece(1, 8, 2, 0), *(Piece(i, 8 + i, 1, 0) for i in range(2, 8)), Piece(8, 16, 8, 0))
    cells = row_cells(make_batch((pieces,), ("T" * 24,)), 0, ignore_index=IGNORED, width=3)
    assert [cell.piece for cell in cells] == [0, 1, 8]
    assert piece_marks(cells) == {0: 0, 1: 1, 8: 2}


def test_a_character_shows_what_most_of_its_tokens_are():
    # three characters of 4 tokens: half is not most, and only the tokens of the conversation that shows count
    batch = make_batch(((Piece(0, 0, 5, 0), Piece(1, 5, 4, 0), Piece(2, 9, 3, 0)),), ("TT....TTT..T",))
    assert draw(batch, rows=[0], width=7 + 3).split("\n")[1] == "row 0  aBc"


@pytest.mark.parametrize("width", [17, 40, 80, 81, 200])
def test_no_line_of_a_row_is_wider_than_the_terminal(width):
    batch = make_batch(((Piece(0, 0, 2048, 0),),), ("T" * 2048,))
    *drawing, key = draw(batch, rows=[0], width=width).split("\n")
    assert max(map(len, drawing)) <= width
    assert f"one character is {-(-2048 // (width - 7))} tokens" in key


def test_ruler_and_rows_are_aligned_however_many_rows_there_are():
    batch = make_batch(((),) * 101, ("." * 12,) * 101)
    ruler, row_9, row_100, _ = draw(batch, rows=[9, 100]).split("\n")
    assert ruler.index("0") == row_9.index(".") == row_100.index(".")


def test_list_names_every_piece_with_place_and_tokens():
    assert listed(make_batch()) == (
        "   conversation    column  tokens  in loss  begins\n"
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


def test_numbers_are_aligned_on_the_right():
    rows = [("conversations", "2,486", "packed"), ("", "1", "dropped"), ("ledger", "balanced", "")]
    assert columns(rows, "<><") == (
        "conversations     2,486  packed\n                      1  dropped\nledger         balanced"
    )


@pytest.mark.parametrize(
    ("text", "room", "clipped"),
    [
        ("short", 5, "short"),
        ("longer", 5, "lo..."),
        ("日本語日本語", 12, "日本語日本語"),
        ("日本語日本語", 9, "日本語..."),
        ("日本語日本語", 8, "日本 ..."),
    ],
    ids=["fits", "cut", "wide fits", "wide", "wide, odd"],
)
def test_text_is_clipped_to_the_columns_that_it_takes_on_a_terminal(text, room, clipped):
    assert clip(text, room) == clipped
    assert cell_len(clipped) <= room


def test_control_characters_never_reach_the_terminal():
    assert printable("bell \x07 and \x1b[31mred\n") == "bell ? and ?[31mred?"
    assert columns([("[bold]file[/bold]:\x1b[2J", "1", "\x9b31m :smile:")], "<><") == (
        "[bold]file[/bold]:?[2J  1  ?31m :smile:"
    )


def test_words_of_a_conversation_stay_on_their_line():
    batch = make_batch()
    lines = list_pieces(
        batch, 0, where=str, text=lambda ids: "two\n  lines\tof text", ignore_index=IGNORED, width=80, colour=False
    ).split("\n")
    assert len(lines) == 5 and lines[1].endswith("  two lines of text")


def test_wide_characters_keep_columns_aligned():
    lines = columns([("日本.jsonl:1", "5", "a"), ("chats.jsonl:10", "10", "b")], "<><").split("\n")
    assert lines == ["日本.jsonl:1     5  a", "chats.jsonl:10  10  b"]


def test_without_a_width_nothing_is_cut_or_wrapped():
    name, words = "n" * 300, "w " * 300
    assert columns([(name, "1,000,000", words)], "<><") == f"{name}  1,000,000  {words}".rstrip()


def test_a_narrow_width_cuts_words_but_no_name_or_number():
    name = "n" * 100
    assert columns([(name, "1,000,000", "w" * 50)], "<><", width=40) == f"{name}  1,000,000  {'w' * 13}..."


def test_losses_are_a_table_and_a_curve():
    drawn = draw_losses({25: 2.0, 50: 1.0}, {0: 5.0, 25: 3.0, 50: 1.0}, colour=False).split("\n")
    assert [line.split()[:3] for line in drawn[2:]] == [["25", "2.000", "3.000"], ["50", "1.000", "1.000"]]
    at = [[(mark, line.index(mark)) for mark in "ox" if mark in line] for line in drawn[1:]]
    left = drawn[0].index("1.00")
    assert at == [[("x", left + 47)], [("o", left + 12), ("x", left + 24)], [("x", left)]]


def test_words_get_some_room_on_the_narrowest_terminal():
    assert listed(make_batch(), width=20).split("\n")[1].endswith("ids 0 to 4")
