import json

import pytest

from fastlora.cli.data import read_rows
from fastlora.cli.errors import CommandError

USER = {"role": "user", "content": "Hello?"}
ANSWER = {"role": "assistant", "content": "Hello."}
GOOD = {"messages": [USER, ANSWER]}


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize(
    "kind, row",
    [
        ("messages", GOOD),
        ("messages", {"messages": [{"role": "system", "content": "Be kind."}, USER, ANSWER, USER, ANSWER]}),
        ("prompt-completion", {"prompt": "1 + 1 =", "completion": " 2"}),
        ("text", {"text": "Once upon a time"}),
    ],
)
def test_each_kind_is_read_without_its_other_keys(tmp_path, kind, row):
    path = write(tmp_path / "rows.jsonl", {**row, "id": 7}, "", row)
    rows = read_rows(path)
    assert (rows.kind, rows.rows) == (kind, [row, row])


@pytest.mark.parametrize(
    "row, complaint",
    [
        ('{"text": "cut', "not JSON: Unterminated string starting at at column 10"),
        ("[1, 2]", "a JSON list; a row is a JSON object with"),
        ("{}", 'keys are none; a row needs a "messages" list'),
        ({"question": "q", "answer": "a"}, "keys are question, answer; a row needs"),
        ({"prompt": "p"}, 'no "completion" beside "prompt"'),
        ({"completion": "c"}, 'no "prompt" beside "completion"'),
        ({**GOOD, "text": "t"}, "is both a messages row and a text row"),
        ({"text": "t"}, "a text row, but line 1 is a messages row: a file holds one kind"),
        ({"text": None}, '"text" is a JSON null; it needs a string'),
        ({"text": " \n"}, '"text" is empty'),
        ({"prompt": 3, "completion": "c"}, '"prompt" is a JSON number; it needs a string'),
        ({"prompt": "p", "completion": ""}, '"completion" is empty'),
        ({"messages": "hello"}, '"messages" is a JSON string; it needs a list of messages'),
        ({"messages": []}, '"messages" is empty'),
        ({"messages": ["hello"]}, '"messages[0]" is a JSON string; it needs an object with "role" and "content"'),
        ({"messages": [{"role": "user"}]}, '"messages[0]" has no "content"'),
        ({"messages": [{"content": "hello"}]}, '"messages[0]" has no "role"'),
        ({"messages": [{**USER, "content": ["hello"]}, ANSWER]}, '"messages[0].content" is a JSON list'),
        ({"messages": [{**USER, "content": ""}, ANSWER]}, '"messages[0].content" is empty'),
        ({"messages": [{**USER, "role": "human"}]}, '"messages[0].role" is "human"; it needs "system" or "user"'),
        ({"messages": [ANSWER]}, '"messages[0].role" is "assistant"; it needs "system" or "user"'),
        ({"messages": [USER, USER]}, '"messages[1].role" is "user"; it needs "assistant"'),
        ({"messages": [USER, ANSWER, {**USER, "role": "system"}]}, '"messages[2].role" is "system"; it needs "user"'),
        ({"messages": [USER, {**ANSWER, "role": ["a"]}]}, '"messages[1].role" is ["a"]; it needs "assistant"'),
        ({"messages": [USER, ANSWER, USER]}, 'the last role is "user"; it needs "assistant", the answer to learn'),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, row, complaint):
    path = write(tmp_path / "rows.jsonl", GOOD, "", row)
    with pytest.raises(CommandError) as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_without_rows_or_without_text(tmp_path):
    with pytest.raises(CommandError, match="no such file"):
        read_rows(tmp_path / "absent.jsonl")
    with pytest.raises(CommandError, match="holds no rows"):
        read_rows(write(tmp_path / "empty.jsonl", "", ""))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(CommandError, match="cannot be read as UTF-8"):
        read_rows(tmp_path / "binary.jsonl")
    with pytest.raises(CommandError, match="cannot be read"):
        read_rows(tmp_path)


def test_a_line_separator_inside_a_string_does_not_split_the_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one\u2028two"}\n', encoding="utf-8")
    assert read_rows(path).rows == [{"text": "one\u2028two"}]
