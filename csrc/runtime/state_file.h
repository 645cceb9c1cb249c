// The file format of saved sequences: safetensors, so that any tool for it can look inside.
//   __metadata__   format "tlinformer-state", version, config (as in config.json), dtype, lengths
//                  of the sequences, fingerprint of the weights, checksum of all tensors' bytes
//   sequences.{i}.tokens, .logits   int32 (length), float32 (V): of the token after the last one
//   sequences.{i}.{region}.{block}.{layer}.{keys,values}   (Hkv, rows, d), the rows in use alone
// A header follows from model and lengths, so that a reader compares instead of believing it.
#pragma once

#include <string>
#include <vector>

#include "file.h"
#include "json.h"
#include "tlinformer/state.h"

namespace tlinformer {

struct StateTensor {
  std::string part;      // tokens, logits, or the name of a region
  int64_t sequence = 0;  // in the file
  int block = -1, layer = -1;
  bool values = false;  // of a region
  int64_t rows = 0;
  int64_t begin = 0, bytes = 0;  // in the data, which follows the header
};

struct StateLayout {
  Json header;
  std::vector<StateTensor> tensors;  // in the order of their bytes
  int64_t data_bytes = 0;
};

struct StateHeader {
  StateInfo info;
  std::string fingerprint, checksum;  // 16 hexadecimal digits each
};

// What a file with this header holds. Throws InvalidArgument where that exceeds `most` bytes.
StateLayout layout_of(const StateHeader& header, int64_t most);

// The bytes before the data: 8 with the length, then the header.
std::string encode(const Json& header);

// Throws InvalidArgument.
StateHeader read_state_header(const Json& header);

// The header of an open file, and where its data begin.
Json read_header(const InputFile& file, int64_t& data);

// Throws InvalidArgument naming the first field in which the two differ.
void require_same(const Config& saved, const Config& own);

}  // namespace tlinformer
