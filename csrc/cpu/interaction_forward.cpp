// Scores of every text with every SMILES: blocks of the similarity matrix are made in a cache-sized scratch and reduced
// in both directions at once, so the matrix itself never exists.
//
// The product is our own and not torch's. Measured on one AVX2 core (Zen 3): 102 GFLOP/s for tiles.h, 88 for torch.mm at
// its best shape; the reductions of a block that is still in the cache add 5 % at D = 768, while torch operators over it
// add as much again as the product.

#include "interaction.h"
#include "panels.h"

namespace atomas {
namespace ATOMAS_ISA {
namespace {

// A block holds whole sequences: at least one, and no more than this many tokens otherwise. Large enough to waste
// little in the last tile, small enough for the scratch (256 KiB) to stay in the second-level cache.
constexpr int64_t kTextTokens = 128;
constexpr int64_t kSmilesTokens = 512;
// SMILES panels that stay in the cache while all rows of a text block pass by.
constexpr int64_t kPanelBytes = 256 * 1024;

// One modality, packed block after block.
template <class Panel>
class Side {
 public:
  using Element = typename Panel::Element;

  Side(const Ragged& ragged, int64_t block_tokens, int threads)
      : ragged_(ragged),
        first_(ragged.count + 1),
        offset_(ragged.count + 1),
        inverse_norm_(ragged.total()),
        finite_(ragged.count),
        blocks_(partition(block_tokens)),
        packed_(offset_[blocks_] * panel_size()),
        rows_of_(ragged.tokens.type == Float::single ? 0 : threads * Panel::kTokens * ragged.width()) {}

  void pack_block(int64_t worker, int64_t block) const {
    const int64_t end = token(block + 1), width = ragged_.width();
    float* scratch = rows_of_.data() + worker * Panel::kTokens * width;
    Element* to = packed_.data() + offset_[block] * panel_size();
    for (int64_t t = token(block); t < end; t += Panel::kTokens, to += panel_size()) {
      const int64_t count = smaller(Panel::kTokens, end - t);
      const float* rows = rows_of(ragged_.tokens, t, count, scratch);
      for (int64_t i = 0; i < count; ++i) inverse_norm_[t + i] = inverse_norm(rows + i * width, width);
      Panel::pack(ragged_.tokens, t, rows, inverse_norm_.data() + t, count, width, to);
    }
    for (int64_t i = first_[block]; i < first_[block + 1]; ++i) {
      finite_[i] = true;
      for (int64_t t = ragged_.start[i]; t < ragged_.start[i + 1]; ++t) {
        if (inverse_norm_[t] == inverse_norm_[t]) continue;
        finite_[i] = false;
        inverse_norm_[t] = 0;
      }
    }
  }

  int64_t blocks() const { return blocks_; }
  int64_t first(int64_t block) const { return first_[block]; }
  int64_t token(int64_t block) const { return ragged_.start[first_[block]]; }
  int64_t tokens(int64_t block) const { return token(block + 1) - token(block); }
  int64_t panels(int64_t block) const { return offset_[block + 1] - offset_[block]; }
  // Tokens of a block with the zeros that fill its last panel.
  int64_t room(int64_t block) const { return panels(block) * Panel::kTokens; }
  int64_t panel_size() const { return Panel::size(ragged_.width()); }
  const Element* panel(int64_t block, int64_t i) const { return packed_.data() + (offset_[block] + i) * panel_size(); }
  const float* inverse_norms(int64_t block) const { return inverse_norm_.data() + token(block); }
  bool finite(int64_t sequence) const { return finite_[sequence]; }
  int64_t widest() const {
    int64_t most = 0;
    for (int64_t block = 0; block < blocks_; ++block) most = larger(most, room(block));
    return most;
  }

 private:
  int64_t partition(int64_t limit) {
    int64_t blocks = 0;
    offset_[0] = 0;
    for (int64_t i = 0; i < ragged_.count;) {
      first_[blocks] = i;
      int64_t tokens = ragged_.size(i++);
      while (i < ragged_.count && tokens + ragged_.size(i) <= limit) tokens += ragged_.size(i++);
      offset_[blocks + 1] = offset_[blocks] + round_up(tokens, Panel::kTokens) / Panel::kTokens;
      ++blocks;
    }
    first_[blocks] = ragged_.count;
    return blocks;
  }

  const Ragged& ragged_;
  Buffer<int64_t> first_;   // sequence that begins each block
  Buffer<int64_t> offset_;  // panels before each block
  Buffer<float> inverse_norm_;
  Buffer<bool> finite_;
  int64_t blocks_;
  Buffer<Element> packed_;
  Buffer<float> rows_of_;  // each thread's rows of one panel
};

// Largest of n > 0 values and the first index that holds it. Reads whole vectors: up to kLanes - 1 values too many.
inline float first_maximum(const float* values, int64_t n, int32_t* index) {
  const Ints lanes = lane_numbers();
  Ints current = lanes, where = lanes;
  Floats best = splat(-kInfinity);
  for (int64_t j = 0; j < n; j += kLanes) {
    Floats value = load(values + j);
    if (j + kLanes > n) value = lanes < splat(static_cast<int32_t>(n - j)) ? value : splat(-kInfinity);
    const Ints better = value > best;
    best = better ? value : best;
    where = better ? current : where;
    current += kLanes;
  }
  const float maximum = lane_maximum(best);
  *index = lane_minimum(best == splat(maximum) ? where : splat(INT32_MAX));
  return maximum;
}

// Largest of each column over n > 0 rows, and the first row that holds it.
inline void column_maxima(const float* values, int64_t stride, int64_t n, int64_t columns, float* maximum,
                          int32_t* index) {
  for (int64_t j = 0; j < columns; j += kTileColumns) {
    Floats best[kTileVectors];
    Ints where[kTileVectors] = {};
    for (int v = 0; v < kTileVectors; ++v) best[v] = load(values + j + v * kLanes);
    for (int64_t i = 1; i < n; ++i) {
      const Ints row = splat(static_cast<int32_t>(i));
      for (int v = 0; v < kTileVectors; ++v) {
        const Floats value = load(values + i * stride + j + v * kLanes);
        const Ints better = value > best[v];
        best[v] = better ? value : best[v];
        where[v] = better ? row : where[v];
      }
    }
    for (int v = 0; v < kTileVectors; ++v) {
      store(maximum + j + v * kLanes, best[v]);
      store(index + j + v * kLanes, where[v]);
    }
  }
}

// Scratch of one thread.
struct Scratch {
  float* similarity;
  float* column_maximum;
  int32_t* column_index;
};

template <class Format>
void similarities(const Side<typename Format::Left>& text, int64_t g, const Side<typename Format::Right>& smiles,
                  int64_t c, int64_t width, float* out) {
  const int64_t stride = smiles.room(c);
  const int64_t panel_bytes = smiles.panel_size() * int64_t{sizeof(*smiles.panel(c, 0))};
  const int64_t in_cache = larger(1, kPanelBytes / (panel_bytes + 1));
  Format format;
  for (int64_t first = 0; first < smiles.panels(c); first += in_cache) {
    const int64_t last = smaller(first + in_cache, smiles.panels(c));
    for (int64_t i = 0; i < text.panels(g); ++i) {
      for (int64_t j = first; j < last; ++j) {
        format.product(text.panel(g, i), smiles.panel(c, j), width,
                       out + i * Format::Left::kTokens * stride + j * Format::Right::kTokens, stride);
      }
    }
  }
  Format::scale(out, stride, text.inverse_norms(g), text.tokens(g), smiles.inverse_norms(c), smiles.tokens(c));
}

// Scores of text a with the SMILES of block c, from its rows of the similarity block.
template <class Format>
void reduce(const InteractionForward& p, const Side<typename Format::Left>& text, int64_t a,
            const Side<typename Format::Right>& smiles, int64_t c, const float* rows, const Scratch& scratch) {
  const int64_t stride = smiles.room(c);
  const int64_t n = p.text.size(a), first_token = smiles.token(c);
  if (n > 0) column_maxima(rows, stride, n, stride, scratch.column_maximum, scratch.column_index);
  if (n > 0 && p.smiles_match != nullptr) {
    int16_t* match = p.smiles_match + a * p.smiles.total() + first_token;
    for (int64_t j = 0; j < smiles.tokens(c); ++j) match[j] = static_cast<int16_t>(scratch.column_index[j]);
  }
  for (int64_t b = smiles.first(c); b < smiles.first(c + 1); ++b) {
    const int64_t m = p.smiles.size(b), column = p.smiles.start[b] - first_token;
    double sum = 0;
    if (n > 0 && m > 0) {
      for (int64_t j = 0; j < m; ++j) {
        sum += static_cast<double>(p.smiles.weight[p.smiles.start[b] + j]) * scratch.column_maximum[column + j];
      }
      for (int64_t i = 0; i < n; ++i) {
        int32_t index;
        const float maximum = first_maximum(rows + i * stride + column, m, &index);
        sum += static_cast<double>(p.text.weight[p.text.start[a] + i]) * maximum;
        if (p.text_match != nullptr) {
          p.text_match[b * p.text.total() + p.text.start[a] + i] = static_cast<int16_t>(index);
        }
      }
    }
    if (p.scores == nullptr) continue;
    const bool counts = n == 0 || m == 0 || (text.finite(a) && smiles.finite(b));
    p.scores[a * p.smiles.count + b] = counts ? static_cast<float>(sum / 2) : __builtin_nanf("");
  }
}

template <class Format>
void forward(const InteractionForward& p) {
  const Side<typename Format::Left> text(p.text, kTextTokens, p.threads);
  const Side<typename Format::Right> smiles(p.smiles, kSmilesTokens, p.threads);
  const int64_t columns = smiles.widest(), similarity = text.widest() * columns;
  const Buffer<float> similarities_of(p.threads * similarity), column_maxima_of(p.threads * columns);
  const Buffer<int32_t> column_indices_of(p.threads * columns);

  for_each_task(text.blocks() + smiles.blocks(), p.threads, [&](int64_t worker, int64_t block) {
    block < text.blocks() ? text.pack_block(worker, block) : smiles.pack_block(worker, block - text.blocks());
  });
  for_each_task(text.blocks() * smiles.blocks(), p.threads, [&](int64_t worker, int64_t index) {
    const int64_t c = index / text.blocks(), g = index % text.blocks();
    const Scratch scratch{similarities_of.data() + worker * similarity, column_maxima_of.data() + worker * columns,
                          column_indices_of.data() + worker * columns};
    similarities<Format>(text, g, smiles, c, p.text.width(), scratch.similarity);
    for (int64_t a = text.first(g); a < text.first(g + 1); ++a) {
      const float* rows = scratch.similarity + (p.text.start[a] - text.token(g)) * smiles.room(c);
      reduce<Format>(p, text, a, smiles, c, rows, scratch);
    }
  });
}

}  // namespace

void interaction_forward(const InteractionForward& p) {
#ifdef ATOMAS_AMX
  if (p.text.tokens.type == Float::bfloat && p.smiles.tokens.type == Float::bfloat) return forward<BfloatTiles>(p);
#endif
  forward<SinglePanels>(p);
}

}  // namespace ATOMAS_ISA
}  // namespace atomas
