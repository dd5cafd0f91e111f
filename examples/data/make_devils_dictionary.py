"""Make devils_dictionary_train.txt and devils_dictionary_heldout.txt from the dictd edition.

Usage: python make_devils_dictionary.py devil.dict   (README.md here says where it comes from)
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path
from typing import List

# The first line of an entry: a headword in capitals, then its part of speech.
ENTRY = re.compile(r"^(?P<word>[A-Z][A-Z' -]+), (?P<kind>(?:[a-z]+\.)+) +(?P<text>\S.*)", re.DOTALL)
# Left out: whatever speaks of peoples, creeds or women in the manner of 1911.
LEFT_OUT = re.compile(
    r"nigger|negro|\bjap\b|jews?\b|hebrew|chinaman|chinese|\bindian|savage|mongol|africa"
    r"|aborigin|coloured|half-breed|squaw|gypsy|irish|turk|mohammed|mahomet|koran|allah|saracen"
    r"|moslem|arab|heathen|mormon|slave|wom[ae]n|female|wife|wives|maiden",
    re.IGNORECASE,
)
EVERY_NTH_IS_HELD_OUT = 10
LETTERS = (40, 900)  # shorter definitions hold too little, longer ones are essays


def entries(dictionary: str) -> List[str]:
    """Return one cleaned definition per headword: its prose, without verse, notes and marks."""
    found = []
    for block in re.split(r"\n(?=[A-Z][A-Z' -]+, (?:[a-z]+\.)+ )", dictionary):
        first_paragraph = block.split("\n\n")[0]
        match = ENTRY.match(first_paragraph)
        if match is None or re.search(r"\n\s", first_paragraph):  # indented: verse or a quotation
            continue
        text = re.sub(r"-\n(?=\w)", "-", match["text"])
        text = re.sub(r"[_{}]|\[sic\]", "", " ".join(text.split()))
        text = re.sub(r"\[from [A-Z]+\] ?", "", " ".join(text.split()))
        entry = f"{match['word']}, {match['kind']} {text}"
        complete = text[-1] in ".!?\"')" and text.isascii() and "[" not in text
        if complete and LETTERS[0] <= len(text) <= LETTERS[1] and not LEFT_OUT.search(entry):
            found.append(entry)
    return found


def main() -> None:
    """Write the two files beside this script."""
    source = Path(sys.argv[1]).read_text(encoding="latin-1")
    kept = entries(source)
    parts = {
        "heldout": kept[::EVERY_NTH_IS_HELD_OUT],
        "train": [e for i, e in enumerate(kept) if i % EVERY_NTH_IS_HELD_OUT],
    }
    for name, part in parts.items():
        wrapped = [textwrap.fill(e, 79, break_on_hyphens=False) for e in part]
        path = Path(__file__).with_name(f"devils_dictionary_{name}.txt")
        path.write_text("\n\n".join(wrapped) + "\n", encoding="utf-8")
        print(f"{path.name}: {len(part)} entries, {sum(map(len, part))} characters")


if __name__ == "__main__":
    main()
