// tlin-tokenize TOKENIZER.JSON: for each text from standard input, texts separated by a byte 255
// (which is never part of UTF-8), a line of its token ids.
#include <cstdio>

#include "tlinformer/error.h"
#include "tokenizer.h"

int main(int argc, char** argv) {
  if (argc != 2) return std::fprintf(stderr, "usage: tlin-tokenize TOKENIZER.JSON < TEXTS\n"), 2;
  try {
    const tlinformer::Tokenizer tokenizer(argv[1]);
    std::string text;
    for (int byte = 0; byte != EOF;) {
      byte = std::getchar();
      if (byte != EOF && byte != 255) {
        text += static_cast<char>(byte);
        continue;
      }
      for (int32_t id : tokenizer.encode(text)) std::printf("%d ", id);
      std::printf("\n");
      text.clear();
    }
    return 0;
  } catch (const tlinformer::Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
