#include "state.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "hash.h"
#include "meter.h"
#include "tensors.h"

namespace tlinformer {
namespace {

constexpr int64_t kPiece = int64_t{4} << 20;  // bytes in flight
constexpr char kNoChecksum[] = "0000000000000000";

// Calls visit(offset within [0, bytes), count) piece by piece.
template <class Visit>
void in_pieces(int64_t bytes, const Visit& visit) {
  for (int64_t at = 0; at < bytes; at += kPiece) visit(at, std::min(kPiece, bytes - at));
}

// Calls visit(arena's memory, count) for the rows of a sequence in a region, head by head.
template <class Visit>
void each_piece(const StateHolder& h, const StateTensor& tensor, int64_t sequence,
                const Visit& visit) {
  const Region& region = *h.plan.find(tensor.part, tensor.block, tensor.layer);
  const int64_t row = h.config.head_dim() * size_of(h.plan.options().dtype);
  for (int64_t head = 0; head < h.config.num_key_value_heads; ++head) {
    const int64_t line = (sequence * h.config.num_key_value_heads + head) * region.rows;
    char* at = h.arena + region.offset + (tensor.values ? region.bytes / 2 : 0) + line * row;
    in_pieces(tensor.rows * row, [&](int64_t from, int64_t n) { visit(at + from, n); });
  }
}

}  // namespace

std::string fingerprint_of(const Config& config, const Weights& weights, Backend& backend) {
  Hash64 hash;
  std::vector<char> piece;
  each_tensor(config, weights, [&](const void* tensor, int64_t elements) {
    in_pieces(elements * size_of(weights.dtype), [&](int64_t from, int64_t n) {
      piece.resize(static_cast<size_t>(n));
      backend.read(static_cast<const char*>(tensor) + from, n, piece.data());
      hash.add(piece.data(), n);
    });
  });
  return hash.hex();
}

void save_sequences(const StateHolder& h, const std::string& path,
                    const std::vector<HeldSequence>& sequences, const Progress& progress) {
  StateHeader header{{h.config, h.plan.options().dtype, {}}, h.fingerprint, kNoChecksum};
  for (const HeldSequence& sequence : sequences) header.info.lengths.push_back(sequence.length);
  StateLayout layout = layout_of(header, std::numeric_limits<int64_t>::max());
  OutputFile file(path);
  const std::string first = encode(layout.header);
  file.write(first.data(), static_cast<int64_t>(first.size()));
  Meter meter{&progress, static_cast<double>(layout.data_bytes)};
  Hash64 hash;
  const auto put = [&](const void* data, int64_t bytes) {
    hash.add(data, bytes);
    file.write(data, bytes);
    meter.done += static_cast<double>(bytes);
    meter.poll();
  };
  std::vector<char> piece(kPiece);
  const auto copy = [&](const void* from, int64_t bytes) {
    h.backend.read(from, bytes, piece.data());
    put(piece.data(), bytes);
  };
  for (const StateTensor& tensor : layout.tensors) {
    const int64_t sequence = sequences[static_cast<size_t>(tensor.sequence)].index;
    if (tensor.part == "tokens") {
      put(h.backend.read_tokens(sequence, tensor.rows).data(), tensor.bytes);
    } else if (tensor.part == "logits") {
      const auto* logits =
          reinterpret_cast<const char*>(h.backend.logits() + sequence * h.config.vocab_size);
      in_pieces(tensor.bytes, [&](int64_t from, int64_t n) { copy(logits + from, n); });
    } else {
      each_piece(h, tensor, sequence, copy);
    }
  }
  layout.header["__metadata__"]["checksum"] = hash.hex();
  file.rewrite(0, encode(layout.header));
  file.commit();
}

SavedState::SavedState(const StateHolder& holder, const std::string& path,
                       std::vector<int64_t> chosen, const Progress& progress)
    : holder_(holder), file_(path), chosen_(std::move(chosen)) {
  try {
    const StateHeader header = check_header();
    if (chosen_.empty()) {
      chosen_.resize(header.info.lengths.size());
      std::iota(chosen_.begin(), chosen_.end(), int64_t{0});
    }
    check_room(header.info.lengths);
    check_data(header.checksum, progress);
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(path + ": " + error.what());
  }
}

StateHeader SavedState::check_header() {
  const Json json = read_header(file_, data_);
  StateHeader header = read_state_header(json);
  require_same(header.info.config, holder_.config);
  const DType own = holder_.plan.options().dtype;
  require(header.info.dtype == own, "it was saved in ", name_of(header.info.dtype),
          "; this engine computes in ", name_of(own), ": create it with the state's dtype");
  require(header.fingerprint == holder_.fingerprint,
          "it was saved by a model with other weights (fingerprint ", header.fingerprint,
          "; this engine's have ", holder_.fingerprint, ")");
  layout_ = layout_of(header, file_.bytes() - data_);
  require(file_.bytes() - data_ == layout_.data_bytes, "it has ", file_.bytes() - data_,
          " bytes of data; its sequences need ", layout_.data_bytes);
  require(layout_.header == json, "its header is damaged");
  return header;
}

void SavedState::check_room(const std::vector<int64_t>& saved) const {
  const CachePlanOptions& options = holder_.plan.options();
  const int64_t count = static_cast<int64_t>(saved.size());
  require(static_cast<int64_t>(chosen_.size()) <= options.batch_size, chosen_.size(),
          " of its sequences are to be loaded; this engine holds 1 to ", options.batch_size,
          " (batch_size); choose as many");
  for (int64_t sequence : chosen_) {
    require(sequence >= 0 && sequence < count, "sequence ", sequence, " is not there; it holds ",
            count, ", from 0 on");
    const int64_t length = saved[static_cast<size_t>(sequence)];
    require(length <= options.max_context, "its sequence ", sequence, " has ", length,
            " tokens; this engine was planned for max_context = ", options.max_context,
            "; create it with a larger one");
  }
}

void SavedState::check_data(const std::string& checksum, const Progress& progress) {
  std::vector<char> piece(kPiece);
  Hash64 hash;
  Meter meter{&progress, 2.0 * static_cast<double>(layout_.data_bytes)};
  in_pieces(layout_.data_bytes, [&](int64_t from, int64_t n) {
    file_.read(data_ + from, piece.data(), n);
    hash.add(piece.data(), n);
    meter.done += static_cast<double>(n);
    meter.poll();
  });
  require(hash.hex() == checksum, "its data are damaged: their checksum is ", hash.hex(), ", not ",
          checksum);
  for (int64_t sequence : chosen_) {
    for (const StateTensor& tensor : layout_.tensors) {
      if (tensor.sequence != sequence || tensor.part != "tokens") continue;
      tokens_.emplace_back(static_cast<size_t>(tensor.rows));
      file_.read(data_ + tensor.begin, tokens_.back().data(), tensor.bytes);
      for (int32_t token : tokens_.back()) {
        require(token >= 0 && token < holder_.config.vocab_size, "its token id ", token,
                " is outside the vocabulary, 0 to ", holder_.config.vocab_size - 1);
      }
    }
  }
}

std::vector<int64_t> SavedState::lengths() const {
  std::vector<int64_t> lengths;
  for (const Tokens& tokens : tokens_) lengths.push_back(static_cast<int64_t>(tokens.size()));
  return lengths;
}

void SavedState::restore(const Progress& progress) const {
  std::vector<char> piece(kPiece);
  std::vector<float> logits(static_cast<size_t>(holder_.config.vocab_size));
  const double whole = static_cast<double>(chosen_.size());
  Meter meter{&progress, 2 * whole, whole};
  for (size_t i = 0; i < chosen_.size(); ++i) {
    const int64_t to = static_cast<int64_t>(i);
    holder_.backend.write_tokens(to, 0, tokens_[i].data(), static_cast<int64_t>(tokens_[i].size()));
    for (const StateTensor& tensor : layout_.tensors) {
      if (tensor.sequence != chosen_[i] || tensor.part == "tokens") continue;
      int64_t from = data_ + tensor.begin;
      if (tensor.part == "logits") {
        file_.read(from, logits.data(), tensor.bytes);
        holder_.backend.write_logits(to, logits.data());
        continue;
      }
      each_piece(holder_, tensor, to, [&](char* at, int64_t bytes) {
        file_.read(from, piece.data(), bytes);
        holder_.backend.write(piece.data(), bytes, at);
        from += bytes;
        meter.poll();
      });
    }
    meter.done += 1;
  }
  meter.poll();
}

}  // namespace tlinformer
