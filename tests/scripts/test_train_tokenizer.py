import json
import re
from pathlib import Path

import pytest

from dataset.tokenizer import fingerprint, load_tokenizer, train_bpe
from scripts.train.train_tokenizer import main

ENGLISH = [
    "The old man walked slowly to the river, and there he sat down to think about his children.",
    "She did not know what to say, so she smiled and asked him whether he would like some tea.",
    "In the morning the streets were full of people who had come to see the new king.",
    "Water boils at a lower temperature on a mountain because the air pressure is lower there.",
    "A computer program is a list of instructions which tells the machine what it should do next.",
    "I don't think we've met before; I'm a teacher at the school near the station.",
]
CHINESE = [
    "今天天气很好，我们一起去公园散步，看到很多人在湖边唱歌跳舞。",
    "他说自己从小就喜欢读书，可是家里没有钱，只好到城里去做工。",
    "人工智能可以帮助我们解决很多问题，但是也需要注意安全。",
    "如果你感到压力很大，可以试着和朋友聊一聊，或者出去运动一下。",
    "公司应当按照国家有关规定建立健全管理制度，并向主管部门报告。",
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
]


def rows_file(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_the_command_trains_on_the_kept_sources_as_often_as_told(tmp_path, capsys):
    data = rows_file(tmp_path / "rows.jsonl", [*ENGLISH, *CHINESE])
    labels = tmp_path / "labels.txt"
    labels.write_text("novels/en\n" * len(ENGLISH) + "books/zh\n" * len(CHINESE), encoding="utf-8")
    keep = ["--sources", str(labels), "--keep-sources", "novels=3"]
    arguments = ["--data", str(data), *keep, "--target-vocab-size", "330", "--eval-data", str(data)]
    main([*arguments, "--out", str(tmp_path / "out")])
    assert fingerprint(load_tokenizer(tmp_path / "out")) == fingerprint(train_bpe(ENGLISH * 3, 330))
    printed = capsys.readouterr().out
    assert re.search(r"zh +6 rows +0\.3\d+ characters/token +1\.0\d+ bytes/token", printed), printed
    with pytest.raises(ValueError, match="already holds a tokenizer; choose another --out, or add --overwrite"):
        main([*arguments, "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("labels", "keep", "complaint"),
    [
        ("a\nb\n", "c", "has no row of c"),
        ("a\n", "a", "has 1 lines, but .* has 2 rows"),
        ("a\n" * 3, "a", "has 3 lines"),
    ],
)
def test_labels_that_do_not_fit_the_data_are_refused(tmp_path, labels, keep, complaint):
    data = rows_file(tmp_path / "rows.jsonl", ["one", "two"])
    (tmp_path / "labels.txt").write_text(labels, encoding="utf-8")
    arguments = ["--data", str(data), "--sources", str(tmp_path / "labels.txt"), "--keep-sources", keep]
    with pytest.raises(ValueError, match=complaint):
        main([*arguments, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
