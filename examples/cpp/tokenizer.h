// Byte-level BPE from a tokenizer.json as GPT-2 made it customary: text to token ids and back.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

namespace tlinformer {

class Tokenizer {
 public:
  // Throws FileError or InvalidArgument: for another model than BPE, another pre-tokenizer than
  // ByteLevel with its regular expression, or a normalizer, naming it.
  explicit Tokenizer(const std::string& path);

  // Ids of UTF-8 text; added tokens, such as <|endoftext|>, are recognised in it. Throws
  // InvalidArgument where the text is not UTF-8.
  std::vector<int32_t> encode(const std::string& text) const;
  // The bytes that a token stands for: parts of characters, too.
  const std::string& bytes_of(int32_t token) const;
  int64_t vocab_size() const { return static_cast<int64_t>(bytes_.size()); }

 private:
  void encode_plain(const std::string& text, std::vector<int32_t>& ids) const;
  void encode_word(const std::string& word, std::vector<int32_t>& ids) const;

  struct Merge {
    int32_t rank, token;
  };
  int32_t byte_tokens_[256];
  std::unordered_map<uint64_t, Merge> merges_;  // by the two tokens
  std::map<std::string, int32_t> added_;
  std::vector<std::string> bytes_;  // by token
};

}  // namespace tlinformer
