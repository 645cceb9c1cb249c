"""Writes unicode_classes.h as the tokenizers library classifies characters; run after updating it:

python examples/cpp/unicode_classes.py > examples/cpp/unicode_classes.h
"""

import itertools

from tokenizers import Regex, pre_tokenizers

EVERY = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))


def ranges(pattern: str) -> list[tuple[int, int]]:
    split = pre_tokenizers.Split(Regex(f"[^{pattern}]+"), "removed")
    runs = []
    for run, _ in split.pre_tokenize_str(EVERY):
        first = ord(run[0])
        for before, after in itertools.pairwise(run):  # surrogates interrupt a run
            if ord(after) != ord(before) + 1:
                runs.append((first, ord(before)))
                first = ord(after)
        runs.append((first, ord(run[-1])))
    return runs


print("// Made by unicode_classes.py: first and last code points of the runs of each class.")
print("#pragma once\n\n#include <cstdint>\n\nnamespace tlinformer {\n\n// clang-format off")
for name, pattern in {"kLetters": r"\p{L}", "kNumbers": r"\p{N}", "kSpaces": r"\s"}.items():
    print(f"constexpr uint32_t {name}[][2] = {{")
    line = ""
    for first, last in ranges(pattern):
        item = f"{{{first:#x},{last:#x}}},"
        if len(line) + len(item) > 98:
            print("  " + line)
            line = ""
        line += item
    print("  " + line + "\n};")
print("// clang-format on\n\n}  // namespace tlinformer")
