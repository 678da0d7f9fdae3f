"""Writes golden_prompts.jsonl: chat prompts of manual questions as token ids, for `solocard-export build`.

    PYTHONPATH=. python packaging/sample-model/golden_prompts.py

Run it again when the tokenizer or manual_qa.jsonl changes. `build` keeps those whose greedy answer is clear.
"""

from __future__ import annotations

import json
from pathlib import Path

from runtime.chat.content import parse_messages
from runtime.chat.encoding import DIALECTS, encode_chat
from runtime.tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
PROMPTS = 8


def main() -> None:
    tokenizer = Tokenizer.from_file(HERE / "checkpoint" / "tokenizer.json")
    lines = (HERE / "manual_qa.jsonl").read_text("utf-8").splitlines()
    facts = [json.loads(line) for line in lines if line.strip()]
    questions = [question for fact in facts for question in fact["questions"][:1]][:PROMPTS]
    with (HERE / "golden_prompts.jsonl").open("w", encoding="utf-8") as out:
        for question in questions:
            messages = parse_messages([{"role": "user", "content": question}])
            segments = encode_chat(messages, DIALECTS["dsv4-0731"], thinking=False)
            out.write(json.dumps(tokenizer.encode(segments), separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
