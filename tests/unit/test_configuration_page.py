"""docs/configuration.md is what the code gives, and the table of programs is that of their files."""

import importlib.util
import re

import configuration_page
import pytest

from vidssl.cli import COMMANDS
from vidssl.commands.programs import PROGRAMS


def test_the_page_is_current():
    assert configuration_page.PAGE.read_text() == configuration_page.page(), (
        "run python tools/configuration_page.py"
    )


def test_every_link_within_the_page_has_its_heading():
    text = configuration_page.PAGE.read_text()
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    anchors = {configuration_page.anchor(title) for title in titles}
    links = re.findall(r"\(#([^)]*)\)", text)
    assert links and set(links) <= anchors


@pytest.mark.parametrize("command", PROGRAMS)
def test_the_table_of_programs_is_that_of_the_programs(command):
    program = PROGRAMS[command]
    source = importlib.util.find_spec(COMMANDS[command][0]).loader.get_source(COMMANDS[command][0])
    found = re.search(r"(?:check_command_line\(|answer\(argv, )(\w+), __doc__, \(([^)]*)\)", source)
    assert found[1] == program.name
    assert tuple(re.findall(r'"(\w+)"', found[2])) == program.folders
