"""Each benchmark runs, returns the rows it promises, and the rows show what is claimed."""

import json
import math

import pytest

from benchmarks import accuracy, collectives, memory, op, parity, peers, report


def column(table, name):
    """{first cell: the cell in that column}."""
    index = list(table.columns).index(name)
    return {row[0]: row[index] for row in table.rows}


def test_accuracy_has_every_case_and_ours_are_right():
    (table,) = accuracy.run(("jaxbn", "Flax linen"))
    ours, true = column(table, "jaxbn"), column(table, "true")
    assert list(ours) == list(accuracy.CASES)
    for case, value in true.items():
        if isinstance(value, str):
            assert ours[case] == value
        else:  # 1e-4 is the contract for var at 1e3, 2 % that for the sd of a bfloat16 y
            assert ours[case] == pytest.approx(value, rel=0.02, abs=1e-4)
    assert column(table, "Flax linen")["mask all False: running statistics after"] == "NaN"


def test_a_library_that_lacks_an_option_or_is_not_there_says_so_in_its_cell():
    def lacking(*arguments, **options):
        raise NotImplementedError("no mask")

    assert accuracy.measure(accuracy.uneven_shards, lacking) == "no mask"
    assert accuracy.measure(accuracy.uneven_shards, None) == "not installed"


def test_a_training_step_with_ours_is_smaller_than_with_flax():
    (table,) = memory.run(stages=(1,))
    assert len(table.rows) == 4
    for name, *ratios in table.rows:
        assert all(0.3 < r <= (0.75 if "jaxbn" in name else 1) for r in (ratios[1], ratios[3]))


def test_parity_holds_on_the_roads_and_cases_asked_for():
    roads, cases = ("shard_map, data x model", "vmap", "jit, ghost batches"), ("an empty shard",)
    by_case, by_quantity = parity.run(roads, cases)
    assert [row[0] for row in by_case.rows] == list(roads)
    # Sums over the 512 cells of a channel, in another order.
    tolerance = 2.0**-23 * math.sqrt(512)
    assert max(row[1] for row in by_case.rows) < tolerance
    assert [max(row[1:]) for row in by_quantity.rows] == [row[1] for row in by_case.rows]


def test_collectives_are_counted_with_their_bytes():
    (table,) = collectives.run(("shard_map", "jit, Auto"))
    # Forward: count, mean and var of 64 channels from each of 8 devices. Backward: two sums.
    assert table.rows[0][1] == f"1 / {8 * (2 * 64 + 1) * 4:,} B"
    assert table.rows[0][4].startswith("2 / ")
    assert table.rows[1][4].startswith("3 / ")
    assert table.rows[0][7] == table.rows[1][7] == "0"


def test_op_reports_ratios_to_ours_and_to_the_floor():
    times = {"copy": (1.0, 0.1), "jaxbn": (6.0, 0.1), "Flax linen": (9.0, 0.1)}
    measured = {"projector": dict.fromkeys(op.FLOOR, times)}
    table = op.by_shape(measured, "float32", 25, ("jaxbn", "Flax linen"))
    assert table.rows[1][1:6] == ["Flax linen", 9.0, 0.1 / 9, 1.5, 1.5 / 9]
    assert op.over_shapes(measured).rows == [["Flax linen", 6 / 9, 6 / 9]]


def test_op_times_every_library_in_both_directions():
    libraries = {"jaxbn": peers.ours, "Flax linen": peers.linen, "Haiku": None}
    measured = op.measure((8, 4, 4, 16), "float32", 1, libraries)
    for direction in op.FLOOR:
        assert set(measured[direction]) == {"copy", "jaxbn", "Flax linen"}
        assert all(median > 0 for median, _ in measured[direction].values())


def test_every_case_that_op_times_is_in_the_table_of_cases():
    assert {case.name for case in op.LARGE} >= set(op.NAMES)


def test_report_prints_whole_cells_and_writes_unrounded_numbers(tmp_path, capsys):
    table = report.Table("Title", ["case", "value"], [["x" * 60, 1 / 3]], ["A note."])
    report.show(table)
    printed = capsys.readouterr().out
    for words in ("Title", "x" * 60, "0.333", "A note."):
        assert words in printed
    report.write(tmp_path / "tables.json", [table])
    written = json.loads((tmp_path / "tables.json").read_text())
    assert written["tables"][0]["rows"] == [["x" * 60, 1 / 3]]
    assert {"device", "versions", "command", "date"} <= set(written)


def test_peers_that_are_not_importable_are_none():
    assert set(peers.installed()) == {peer.name for peer in peers.PEERS}
    assert peers.installed()["Flax linen"] is peers.linen
