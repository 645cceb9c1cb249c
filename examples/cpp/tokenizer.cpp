#include "tokenizer.h"

#include <algorithm>
#include <iterator>

#include "runtime/json.h"
#include "runtime/mapped_file.h"
#include "unicode_classes.h"

namespace tlinformer {
namespace {

enum class Class { letter, number, space, other };

struct Character {
  uint32_t code;
  size_t begin;  // its first byte
  Class kind;
};

template <size_t N>
bool is_in(const uint32_t (&ranges)[N][2], uint32_t code) {
  const auto after =
      std::upper_bound(std::begin(ranges), std::end(ranges), code,
                       [](uint32_t value, const uint32_t (&range)[2]) { return value < range[0]; });
  return after != std::begin(ranges) && code <= (*(after - 1))[1];
}

Class class_of(uint32_t code) {
  if (is_in(kLetters, code)) return Class::letter;
  if (is_in(kNumbers, code)) return Class::number;
  return is_in(kSpaces, code) ? Class::space : Class::other;
}

std::vector<Character> characters_of(const std::string& text) {
  std::vector<Character> characters;
  for (size_t at = 0; at < text.size();) {
    const auto byte = [&](size_t i) -> uint32_t {
      return at + i < text.size() ? static_cast<unsigned char>(text[at + i]) : 0;
    };
    const uint32_t lead = byte(0);
    const size_t length = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    uint32_t code = length == 1 ? lead : lead & (0x7f >> length);
    bool valid = lead < 0x80 || (lead >= 0xc2 && lead <= 0xf4);
    for (size_t i = 1; i < length; ++i) {
      valid = valid && (byte(i) & 0xc0) == 0x80;
      code = code << 6 | (byte(i) & 0x3f);
    }
    valid = valid && !(length == 3 && (code < 0x800 || (code >= 0xd800 && code < 0xe000))) &&
            !(length == 4 && (code < 0x10000 || code > 0x10ffff));
    require(valid, "the text is not UTF-8 at byte ", at, "; convert it first");
    characters.push_back({code, at, class_of(code)});
    at += length;
  }
  return characters;
}

// Length of 's 't 're 've 'm 'll 'd at the beginning of the rest; else 0.
size_t contraction(const std::vector<Character>& text, size_t at) {
  const auto code = [&](size_t i) { return at + i < text.size() ? text[at + i].code : 0; };
  if (code(0) != '\'') return 0;
  const uint32_t a = code(1), b = code(2);
  if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
  return (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
}

// The end of the word that begins at `at`, as GPT-2's expression has it:
// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
size_t end_of_word(const std::vector<Character>& text, size_t at) {
  if (const size_t length = contraction(text, at)) return at + length;
  size_t end = at;
  if (text[at].code == ' ' && at + 1 < text.size() && text[at + 1].kind != Class::space) ++end;
  const Class kind = text[end].kind;
  while (end < text.size() && text[end].kind == kind) ++end;
  // Of spaces before a word the last one is left to it.
  if (kind == Class::space && end < text.size() && end - at > 1) --end;
  return end;
}

std::string utf8(uint32_t code) {  // of the alphabet below
  if (code < 0x80) return {static_cast<char>(code)};
  return {static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 0x3f))};
}

// The visible character that stands for each byte in a tokenizer.json.
std::map<std::string, unsigned char> byte_alphabet() {
  std::map<std::string, unsigned char> alphabet;
  uint32_t next = 256;
  for (uint32_t byte = 0; byte < 256; ++byte) {
    const bool visible = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte != 0xad);
    alphabet[utf8(visible ? byte : next++)] = static_cast<unsigned char>(byte);
  }
  return alphabet;
}

void check(const Json& file) {
  const Json& model = file.at("model");
  require(model.at("type") == "BPE", "its model is ", model.at("type").dump(),
          "; only BPE is read");
  const Json& words = file.at("pre_tokenizer");
  require(words.is_object() && words.value("type", "") == "ByteLevel" &&
              words.value("use_regex", true) && !words.value("add_prefix_space", true),
          "its pre_tokenizer is ", words.dump(), "; only ByteLevel with use_regex is read");
  for (const auto& [at, name] : {std::pair{&file, "normalizer"},
                                 {&file, "truncation"},
                                 {&model, "dropout"},
                                 {&model, "continuing_subword_prefix"},
                                 {&model, "end_of_word_suffix"}}) {
    const Json value = at->value(name, Json());
    require(value.is_null(), "it has a ", name, ", ", value.dump(), ", which is not supported");
  }
  require(!model.value("ignore_merges", false), "ignore_merges is not supported");
}

}  // namespace

Tokenizer::Tokenizer(const std::string& path) {
  const MappedFile text(path);
  try {
    read_json(text.begin(), text.end(), [&](const Json& file) {
      check(file);
      const Json& model = file.at("model");
      const auto vocab = model.at("vocab").get<std::unordered_map<std::string, int32_t>>();
      const auto id_of = [&](const std::string& token) {
        const auto at = vocab.find(token);
        require(at != vocab.end(), "token '", token, "' is missing from its vocabulary");
        return at->second;
      };
      const auto put = [&](int32_t id, const std::string& bytes) {
        constexpr int32_t kMost = 1 << 24;
        require(id >= 0 && id < kMost, "token id ", id, " is outside 0 to ", kMost - 1);
        if (static_cast<size_t>(id) >= bytes_.size()) bytes_.resize(static_cast<size_t>(id) + 1);
        bytes_[static_cast<size_t>(id)] = bytes;
      };
      const auto alphabet = byte_alphabet();
      for (const auto& [symbol, byte] : alphabet) byte_tokens_[byte] = id_of(symbol);
      for (const auto& [token, id] : vocab) {
        std::string bytes;
        for (size_t at = 0, length = 0; at < token.size(); at += length) {
          length = (token[at] & 0x80) == 0 ? 1 : 2;
          const auto symbol = alphabet.find(token.substr(at, length));
          if (symbol == alphabet.end()) break;  // an added token, which stands for itself
          bytes += static_cast<char>(symbol->second);
        }
        put(id, bytes);
      }
      for (const Json& added : file.at("added_tokens")) {
        for (const char* option : {"single_word", "lstrip", "rstrip"}) {
          require(!added.value(option, false), "added tokens with ", option, " are not supported");
        }
        const std::string content = added.at("content").get<std::string>();
        require(!content.empty(), "an added token is empty");
        added_[content] = added.at("id").get<int32_t>();
        put(added_[content], content);
      }
      int32_t rank = 0;
      for (const Json& merge : model.at("merges")) {
        std::string left, right;
        if (merge.is_string()) {  // "a b", as older versions write
          const std::string pair = merge.get<std::string>();
          const size_t gap = pair.find(' ');
          require(gap != std::string::npos, "the merge '", pair, "' is no pair");
          left = pair.substr(0, gap), right = pair.substr(gap + 1);
        } else {
          left = merge.at(0).get<std::string>(), right = merge.at(1).get<std::string>();
        }
        const uint64_t key = uint64_t(uint32_t(id_of(left))) << 32 | uint32_t(id_of(right));
        merges_.insert({key, {rank++, id_of(left + right)}});
      }
    });
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(path + ": " + error.what());
  }
}

const std::string& Tokenizer::bytes_of(int32_t token) const {
  require(token >= 0 && token < vocab_size(), "token id ", token, " is outside 0 to ",
          vocab_size() - 1);
  return bytes_[static_cast<size_t>(token)];
}

std::vector<int32_t> Tokenizer::encode(const std::string& text) const {
  std::vector<int32_t> ids;
  for (size_t at = 0; at < text.size();) {
    // The first added token in the rest, and of those that begin there the longest.
    size_t first = text.size();
    const std::pair<const std::string, int32_t>* found = nullptr;
    for (const auto& added : added_) {
      const size_t place = text.find(added.first, at);
      const bool longer = found && place == first && added.first.size() > found->first.size();
      if (place < first || (place != std::string::npos && longer)) first = place, found = &added;
    }
    encode_plain(text.substr(at, first - at), ids);
    if (found) ids.push_back(found->second);
    at = first + (found ? found->first.size() : 0);
  }
  return ids;
}

void Tokenizer::encode_plain(const std::string& text, std::vector<int32_t>& ids) const {
  const std::vector<Character> characters = characters_of(text);
  const auto begin_of = [&](size_t i) {
    return i < characters.size() ? characters[i].begin : text.size();
  };
  for (size_t at = 0; at < characters.size();) {
    const size_t end = end_of_word(characters, at);
    encode_word(text.substr(begin_of(at), begin_of(end) - begin_of(at)), ids);
    at = end;
  }
}

// The merge of the lowest rank first, and of equal ones the leftmost, until none is left.
void Tokenizer::encode_word(const std::string& word, std::vector<int32_t>& ids) const {
  std::vector<int32_t> tokens;
  for (unsigned char byte : word) tokens.push_back(byte_tokens_[byte]);
  while (tokens.size() > 1) {
    const Merge* best = nullptr;
    size_t where = 0;
    for (size_t i = 0; i + 1 < tokens.size(); ++i) {
      const auto merge =
          merges_.find(uint64_t(uint32_t(tokens[i])) << 32 | uint32_t(tokens[i + 1]));
      if (merge == merges_.end() || (best && merge->second.rank >= best->rank)) continue;
      best = &merge->second;
      where = i;
    }
    if (!best) break;
    tokens[where] = best->token;
    tokens.erase(tokens.begin() + static_cast<std::ptrdiff_t>(where) + 1);
  }
  ids.insert(ids.end(), tokens.begin(), tokens.end());
}

}  // namespace tlinformer
