"""Compiled programs are compared without what says only where an instruction was written."""

import pathlib

from tools.compare_hlo import difference, strip

ADD = "  ROOT add.1 = f32[2]{0} add(%a, %b)"


def test_metadata_and_its_tables_are_taken_off():
    metadata = ', metadata={op_name="jit(f)/add{\\"1\\"}" stack_frame_id=3}'
    tables = (
        '\n\nFileNames\n1 "a.py"\n\nFunctionNames\n1 "f"\n\nFileLocations\n1 {file_name_id=1}\n\nStackFrames\n1 {}\n'
    )
    assert strip(ADD + metadata + ", sharding={replicated}\n}" + tables) == ADD + ", sharding={replicated}\n}"


def test_the_first_line_that_differs_is_said(tmp_path: pathlib.Path):
    before, after = tmp_path / "before", tmp_path / "after"
    for folder in (before, after):
        folder.mkdir()
    assert difference(before, after) == f"{before} holds no programs"
    (before / "vae.txt").write_text(f"head\n{ADD}\n")
    assert difference(before, after) == "the programs are ['vae.txt'] and []"
    (after / "vae.txt").write_text(f"head\n{ADD}\n")
    assert difference(before, after) is None
    (after / "vae.txt").write_text(f"head\n{ADD}\ntail\n")
    assert difference(before, after) == "vae.txt:3\n- None\n+ tail"
