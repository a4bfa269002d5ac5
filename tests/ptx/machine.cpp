// Executes the PTX that Triton compiles for NVIDIA GPUs, on a CPU, checking every access.
//
// One program (block of threads) at a time, each of its warps from barrier to barrier, its 32 lanes
// in lock step; where they branch apart, those behind go first, until all are at one place again.
// An instruction is known by its whole name; another one is an error when the kernel is loaded.
//
// Faults: an access of global memory out of bounds, in the gap of a view or misaligned; a read of
// what nobody wrote or of what this launch writes; unequal values stored to one address; an access
// of shared memory out of bounds, misaligned, unordered with another thread's by a barrier, before
// anybody wrote, or while cp.async is still writing; a barrier or warp operation not all threads
// reach. Threads of a warp are ordered by barriers alone: lock step is this machine's, not a GPU's.

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using std::string;

constexpr uint32_t kAll = 0xFFFFFFFF;   // lanes
constexpr int64_t kLongest = 20000000;  // instructions of a warp; beyond, the kernel never ends
constexpr int kTid = 0, kCtaid = 1;     // registers with a meaning; program.py has them too

[[noreturn]] void fault(const string& what) { throw std::runtime_error(what); }

// --------------------------------------------------------------------------- global memory

enum : uint8_t { kOpen = 1, kInitialised = 2, kWritten = 4, kRead = 8 };

struct Region {
  uint64_t base, size;
  uint8_t* flags;  // of each byte
};

struct Global {
  const Region* regions;
  int64_t count;

  uint8_t* check(uint64_t address, unsigned width, const char* what) {
    const auto refuse = [&](const char* why) {
      std::ostringstream message;
      message << what << " of " << width << " bytes at 0x" << std::hex << address << ", " << why;
      fault(message.str());
    };
    if (address % width) refuse("misaligned");
    for (const Region* r = regions; r != regions + count; ++r) {
      const uint64_t at = address - r->base;
      if (at >= r->size || width > r->size - at) continue;
      for (unsigned i = 0; i < width; ++i) {
        if (!(r->flags[at + i] & kOpen)) refuse("outside the tensor's elements");
      }
      return r->flags + at;
    }
    refuse("out of bounds");
    return nullptr;
  }

  void load(uint64_t address, void* to, unsigned width) {
    uint8_t* flags = check(address, width, "load");
    for (unsigned i = 0; i < width; ++i) {
      if (!(flags[i] & kInitialised)) fault("load of global memory that nobody wrote");
      if (flags[i] & kWritten) fault("load of what this launch wrote");
      flags[i] |= kRead;
    }
    std::memcpy(to, reinterpret_cast<const void*>(address), width);
  }

  void store(uint64_t address, const void* from, unsigned width) {
    uint8_t* flags = check(address, width, "store");
    const bool equal = !std::memcmp(reinterpret_cast<const void*>(address), from, width);
    for (unsigned i = 0; i < width; ++i) {
      if (flags[i] & kWritten && !equal) fault("unequal values stored to one global address");
      if (flags[i] & kRead) fault("store to what this launch reads");
      flags[i] |= kInitialised | kWritten;
    }
    std::memcpy(reinterpret_cast<void*>(address), from, width);
  }
};

// --------------------------------------------------------------------------- shared memory

constexpr int kSeveral = -1, kWarp = 1 << 16;  // no thread's number; of a whole warp

struct Shared {
  struct Byte {
    int writer, reader;
    int64_t written, read;  // in which stretch between barriers; 0: never
    bool copying;
    uint8_t value;
  };
  std::vector<Byte> bytes;
  int64_t stretch = 1;

  Byte* check(uint64_t address, unsigned width, const char* what) {
    if (address % width) fault("misaligned shared " + string(what));
    if (address + width > bytes.size()) {
      fault("shared " + string(what) + " at " + std::to_string(address) + " out of bounds");
    }
    for (unsigned i = 0; i < width; ++i) {
      if (bytes[address + i].copying) fault("shared " + string(what) + " before cp.async ended");
    }
    return &bytes[address];
  }

  void load(int thread, uint64_t address, void* to, unsigned width) {
    Byte* b = check(address, width, "load");
    for (unsigned i = 0; i < width; ++i, ++b) {
      if (!b->written) fault("load of shared memory that nobody wrote");
      if (b->written == stretch && b->writer != thread) fault("race: shared read after write");
      b->reader = b->read == stretch && b->reader != thread ? kSeveral : thread;
      b->read = stretch;
      static_cast<uint8_t*>(to)[i] = b->value;
    }
  }

  void store(int thread, uint64_t address, const void* from, unsigned width) {
    Byte* b = check(address, width, "store");
    for (unsigned i = 0; i < width; ++i, ++b) {
      const uint8_t value = static_cast<const uint8_t*>(from)[i];
      if (b->read == stretch && b->reader != thread) fault("race: shared write after read");
      if (b->written == stretch && b->writer != thread && b->value != value) {
        fault("race: unequal values stored to one shared address");
      }
      b->writer = thread, b->written = stretch, b->value = value;
    }
  }
};

// ------------------------------------------------------------------------- the 16-bit floats

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct Half {
  uint16_t value;
  Half() = default;
  Half(float f) {  // to nearest even
    uint32_t u = bits<uint32_t>(f);
    const uint16_t sign = u >> 16 & 0x8000;
    u &= 0x7FFFFFFF;
    if (u > 0x7F800000) {
      value = 0x7FFF;
    } else if (u >= 0x47800000) {
      value = sign | 0x7C00;
    } else if (u < 0x38800000) {  // adding 0.5 rounds to the subnormals' unit, 2^-24
      value = sign | (bits<uint32_t>(bits<float>(u) + 0.5f) - bits<uint32_t>(0.5f));
    } else {
      value = sign | (u + 0xFFF + (u >> 13 & 1) - 0x38000000) >> 13;
    }
  }
  operator float() const {
    const int exponent = value >> 10 & 31, mantissa = value & 1023;
    if (exponent == 31)
      return bits<float>(uint32_t(value & 0x8000) << 16 | 0x7F800000 | mantissa << 13);
    const float size =
        std::ldexp(float(exponent ? mantissa | 1024 : mantissa), (exponent ? exponent : 1) - 25);
    return value & 0x8000 ? -size : size;
  }
};

struct BFloat {
  uint16_t value;
  BFloat() = default;
  BFloat(float f) {
    const uint32_t u = bits<uint32_t>(f);
    value = f != f ? 0x7FFF : (u + 0x7FFF + (u >> 16 & 1)) >> 16;
  }
  operator float() const { return bits<float>(uint32_t(value) << 16); }
};

template <class T>
struct Pair {
  T low, high;
};

// ------------------------------------------------------------------------- programs and warps

struct Operand {
  int reg;
  int64_t offset;  // of an address
};

using Operands = std::vector<Operand>;

using Row = std::array<uint64_t, 32>;  // a register, of all lanes of a warp

struct Copy {
  int thread;
  uint64_t address;
  unsigned width;
};

struct Warp {
  Global& global;
  Shared& shared;
  std::vector<Row> registers;
  int number;
  size_t next = 0;  // instruction, of the lanes that go on
  bool waiting = false, done = false;
  bool apart = false;
  std::array<size_t, 32> places;  // of the lanes, while they are apart
  uint32_t held = 0;              // lanes at what all must do together
  std::vector<Copy> copies;       // not committed
  std::deque<std::vector<Copy>> groups;
};

using Step = std::function<void(Warp&, const Operands&, uint32_t lanes)>;

struct Known {
  size_t operands;
  Step step;
  bool together = false;  // all lanes of a warp
};

struct Instruction {
  string op, text;
  int predicate = -1;
  bool negated = false;
  Operands operands;
  const Known* known = nullptr;
};

struct Program {
  std::vector<Instruction> instructions;
  std::vector<std::pair<int, uint64_t>> constants;  // register, value
  std::vector<int> parameters;                      // registers
  int registers = 0, threads = 0;
};

template <class T>
T get(uint64_t raw) {
  if constexpr (std::is_same_v<T, bool>) {
    return raw & 1;
  } else {
    T value;
    std::memcpy(&value, &raw, sizeof value);
    return value;
  }
}

template <class T>
uint64_t put(T value) {
  uint64_t raw = 0;
  if constexpr (std::is_same_v<T, float>) {
    if (value != value) return 0x7FFFFFFF;  // NVIDIA's NaN
  }
  std::memcpy(&raw, &value, sizeof value);
  return raw;
}

// ---------------------------------------------------------------------------- instructions

std::map<string, Known> table;

template <class F>
void each_lane(uint32_t lanes, F f) {
  if (lanes == kAll) {  // half the time of asking each lane
#pragma GCC ivdep
    for (int lane = 0; lane < 32; ++lane) f(lane);
  } else {
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes >> lane & 1) f(lane);
    }
  }
}

// Operand 0 becomes f of the others, which are of the types A; of each lane on its own.
template <class R, class... A, class F, size_t... I>
void define_as(const string& name, F f, std::index_sequence<I...>) {
  const auto step = [f](Warp& w, const Operands& o, uint32_t lanes) {
    const uint64_t* const from[] = {w.registers[o[1 + I].reg].data()...};
    Row& to = w.registers[o[0].reg];
    each_lane(lanes, [&](int lane) { to[lane] = put<R>(R(f(get<A>(from[I][lane])...))); });
  };
  table[name] = {1 + sizeof...(A), step};
}

template <class R, class... A, class F>
void define(const string& name, F f) {
  define_as<R, A...>(name, f, std::index_sequence_for<A...>());
}

template <class T>
void compare(const string& type) {
  const auto def = [&](const char* name, auto f) {
    define<bool, T, T>("setp." + string(name) + "." + type, f);
  };
  def("lt", [](T a, T b) { return a < b; });
  def("le", [](T a, T b) { return a <= b; });
  def("gt", [](T a, T b) { return a > b; });
  def("ge", [](T a, T b) { return a >= b; });
  def("eq", [](T a, T b) { return a == b; });
  if constexpr (std::is_integral_v<T>) {
    def("ne", [](T a, T b) { return a != b; });
  } else {
    def("neu", [](T a, T b) { return a != b; });
    def("ltu", [](T a, T b) { return !(a >= b); });
    def("leu", [](T a, T b) { return !(a > b); });
    def("gtu", [](T a, T b) { return !(a <= b); });
    def("geu", [](T a, T b) { return !(a < b); });
    def("num", [](T a, T b) { return a == a && b == b; });
    def("nan", [](T a, T b) { return a != a || b != b; });
  }
}

template <class T>
void untyped(const string& type) {
  define<T, T>("mov." + type, [](T a) { return a; });
  define<T, T, T>("and." + type, [](T a, T b) { return a & b; });
  define<T, T, T>("or." + type, [](T a, T b) { return a | b; });
  define<T, T, T>("xor." + type, [](T a, T b) { return a ^ b; });
  if constexpr (!std::is_same_v<T, bool>) {
    constexpr uint32_t width = 8 * sizeof(T);
    define<T, T>("not." + type, [](T a) { return ~a; });
    define<T, T, T, bool>("selp." + type, [](T a, T b, bool c) { return c ? a : b; });
    define<T, T, uint32_t>("shl." + type,
                           [](T a, uint32_t n) { return n < width ? uint64_t(a) << n : 0; });
    compare<T>(type);
  } else {
    define<T, T>("not." + type, [](T a) { return !a; });
  }
}

template <class T>
void integer(const string& type) {
  using U = std::make_unsigned_t<T>;
  constexpr uint32_t width = 8 * sizeof(T);
  define<U, U, U>("add." + type, [](U a, U b) { return a + b; });
  define<U, U, U>("sub." + type, [](U a, U b) { return a - b; });
  define<T, T, T>("min." + type, [](T a, T b) { return a < b ? a : b; });
  define<T, T, T>("max." + type, [](T a, T b) { return a > b ? a : b; });
  define<U, U>("neg." + type, [](U a) { return U(0) - a; });
  define<U, U, U>("mul.lo." + type, [](U a, U b) { return uint64_t(a) * b; });
  define<U, U, U, U>("mad.lo." + type, [](U a, U b, U c) { return uint64_t(a) * b + c; });
  define<T, T, uint32_t>("shr." + type, [](T a, uint32_t n) {
    return n < width ? a >> n : a < 0 ? T(-1) : T(0);
  });
  define<T, T>("mov." + type, [](T a) { return a; });
  compare<T>(type);
  if constexpr (sizeof(T) == 4) {
    using W = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
    define<W, T, T>("mul.wide." + type, [](W a, W b) { return a * b; });
    define<W, T, T, W>("mad.wide." + type,
                       [](W a, W b, W c) { return uint64_t(a * b) + uint64_t(c); });
    define<T, T, T>("div." + type,
                    [](W a, W b) { return b ? a / b : (fault("division by zero"), b); });
    define<T, T, T>("rem." + type,
                    [](W a, W b) { return b ? a % b : (fault("division by zero"), b); });
    define<T, T, uint32_t, uint32_t>("bfe." + type, [](T a, uint32_t at, uint32_t n) {
      if (n == 0 || at + n > 32) fault("unknown bit field");
      return T(U(a) << (32 - at - n)) >> (32 - n);
    });
  }
}

template <class T>
void floating(const string& type) {
  define<T, T, T>("add.rn." + type, [](T a, T b) { return a + b; });
  define<T, T, T>("sub.rn." + type, [](T a, T b) { return a - b; });
  define<T, T, T>("mul.rn." + type, [](T a, T b) { return a * b; });
  if constexpr (std::is_floating_point_v<T>) {
    define<T, T, T>("div.rn." + type, [](T a, T b) { return a / b; });
    define<T, T>("sqrt.rn." + type, [](T a) { return std::sqrt(a); });
    define<T, T, T, T>("fma.rn." + type, [](T a, T b, T c) { return std::fma(a, b, c); });
    define<T, T, T>("min." + type, [](T a, T b) { return std::fmin(a, b); });
    define<T, T, T>("max." + type, [](T a, T b) { return std::fmax(a, b); });
    using U = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;  // a NaN keeps its bits
    define<U, U, U, bool>("selp." + type, [](U a, U b, bool c) { return c ? a : b; });
  }
  compare<T>(type);
}

// What is only near the exact result on a GPU is made 1 or 2 units wrong here, by the bits alone.
float approximate(double exact) {
  const float y = float(exact);
  if (!std::isnormal(y)) return y;
  constexpr int wrong[] = {-2, -1, 1, 2};
  return bits<float>(bits<uint32_t>(y) + wrong[bits<uint32_t>(y) * 2654435761u >> 30]);
}

float flush(float a) { return std::fpclassify(a) == FP_SUBNORMAL ? std::copysign(0.f, a) : a; }

template <class T>
void pairs(const string& type) {
  using P = Pair<T>;
  define<P, P, P>("add.rn." + type + "x2",
                  [](P a, P b) { return P{float(a.low) + b.low, float(a.high) + b.high}; });
  define<P, float, float>("cvt.rn." + type + "x2.f32",
                          [](float high, float low) { return P{low, high}; });
  define<T, float>("cvt.rn." + type + ".f32", [](float a) { return a; });
  define<float, T>("cvt.f32." + type, [](T a) { return a; });
  for (const bool equal : {false, true}) {
    const auto step = [equal](Warp& w, const Operands& o, uint32_t lanes) {
      const auto holds = [&](float x, float y) { return equal ? x == y : x == x && y == y; };
      each_lane(lanes, [&](int lane) {
        const P a = get<P>(w.registers[o[2].reg][lane]), b = get<P>(w.registers[o[3].reg][lane]);
        w.registers[o[0].reg][lane] = holds(a.low, b.low);
        w.registers[o[1].reg][lane] = holds(a.high, b.high);
      });
    };
    table["setp." + string(equal ? "eq." : "num.") + type + "x2"] = {4, step};
  }
}

// What all lanes of a warp do together.
template <class F>
void together(const string& name, size_t operands, F f) {
  const auto step = [f](Warp& w, const Operands& o, uint32_t lanes) {
    if (lanes != kAll) fault("not all lanes reach a warp's operation");
    f(w, o);
  };
  table[name] = {operands, step, true};
}

void whole_warp(const Warp& w, int mask) {
  for (const uint64_t lane : w.registers[mask]) {
    if (uint32_t(lane) != kAll) fault("a warp's operation by some of its lanes");
  }
}

void shuffles() {
  const auto shuffle = [](const string& mode, auto source) {
    together("shfl.sync." + mode + ".b32", 5, [source](Warp& w, const Operands& o) {
      whole_warp(w, o[4].reg);
      const Row a = w.registers[o[1].reg];
      for (int lane = 0; lane < 32; ++lane) {
        const uint32_t clamp = uint32_t(w.registers[o[3].reg][lane]);
        if (clamp >> 8) fault("shuffle in segments");
        const int from = source(lane, int(w.registers[o[2].reg][lane]), int(clamp & 31));
        w.registers[o[0].reg][lane] = uint32_t(a[from < 0 ? lane : from]);
      }
    });
  };
  shuffle("bfly",
          [](int lane, int by, int last) { return (lane ^ by) <= last ? (lane ^ by) & 31 : -1; });
  shuffle("idx", [](int, int by, int last) { return (by & 31) <= last ? by & 31 : -1; });
  shuffle("up", [](int lane, int by, int first) { return lane - by >= first ? lane - by : -1; });
}

template <class T, class F>
void reduce(const string& name, F f) {
  together("redux.sync." + name, 3, [f](Warp& w, const Operands& o) {
    whole_warp(w, o[2].reg);
    T all = get<T>(w.registers[o[1].reg][0]);
    for (int lane = 1; lane < 32; ++lane) all = f(all, get<T>(w.registers[o[1].reg][lane]));
    w.registers[o[0].reg].fill(put(all));
  });
}

uint64_t address_of(const Warp& w, const Operand& o, int lane, bool is_shared) {
  const uint64_t address = w.registers[o.reg][lane] + o.offset;
  return is_shared ? uint32_t(address) : address;
}

void memory(const string& space, unsigned count, unsigned width, bool is_signed = false) {
  const bool is_shared = space != "global";
  const unsigned size = count * width;
  const string vector = count > 1 ? ".v" + std::to_string(count) : "";
  const string name = space + vector + (is_signed ? ".s" : ".b") + std::to_string(8 * width);
  const auto load = [=](Warp& w, const Operands& o, uint32_t lanes) {
    each_lane(lanes, [&](int lane) {
      const uint64_t address = address_of(w, o[count], lane, is_shared);
      uint8_t data[16];
      if (is_shared) {
        w.shared.load(w.number * 32 + lane, address, data, size);
      } else {
        w.global.load(address, data, size);
      }
      for (unsigned i = 0; i < count; ++i) {
        uint64_t value = 0;
        std::memcpy(&value, data + i * width, width);
        w.registers[o[i].reg][lane] = is_signed ? int32_t(value) : value;
      }
    });
  };
  const auto store = [=](Warp& w, const Operands& o, uint32_t lanes) {
    each_lane(lanes, [&](int lane) {
      const uint64_t address = address_of(w, o[0], lane, is_shared);
      uint8_t data[16];
      for (unsigned i = 0; i < count; ++i) {
        std::memcpy(data + i * width, &w.registers[o[1 + i].reg][lane], width);
      }
      if (is_shared) {
        w.shared.store(w.number * 32 + lane, address, data, size);
      } else {
        w.global.store(address, data, size);
      }
    });
  };
  table["ld." + name] = {1 + count, load};
  table["st." + name] = {1 + count, store};
}

void copies() {
  const auto copy = [](Warp& w, const Operands& o, uint32_t lanes) {
    each_lane(lanes, [&](int lane) {
      const unsigned width = unsigned(w.registers[o[2].reg][lane]);
      const unsigned size = unsigned(w.registers[o[3].reg][lane]);
      if (width > 16 || (size && size != width)) fault("cp.async of a part");
      uint8_t data[16] = {};  // with size 0 zeros are written, and nothing is read
      if (size) w.global.load(address_of(w, o[1], lane, false), data, size);
      const Copy copy{w.number * 32 + lane, address_of(w, o[0], lane, true), width};
      w.shared.store(copy.thread, copy.address, data, width);
      for (unsigned i = 0; i < width; ++i) w.shared.bytes[copy.address + i].copying = true;
      w.copies.push_back(copy);
    });
  };
  table["cp.async.ca.shared.global"] = table["cp.async.cg.shared.global"] = {4, copy};
  together("cp.async.commit_group", 0,
           [](Warp& w, const Operands&) { w.groups.push_back(std::exchange(w.copies, {})); });
  together("cp.async.wait_group", 1, [](Warp& w, const Operands& o) {
    for (; w.groups.size() > w.registers[o[0].reg][0]; w.groups.pop_front()) {
      for (const Copy& copy : w.groups.front()) {
        for (unsigned i = 0; i < copy.width; ++i) {
          Shared::Byte& b = w.shared.bytes[copy.address + i];
          b.copying = false, b.writer = copy.thread, b.written = w.shared.stretch;
        }
      }
    }
  });
}

// Matrices of 8 rows of 8 elements: lane 8 i + r has the address of row r of the i-th one, and of
// each one lane l has elements 2 (l % 4) and the next of row l / 4, or with `trans` of that column.
void matrices(unsigned count) {
  const auto name = [=](const char* op, const char* trans) {
    return string(op) + ".sync.aligned.m8n8.x" + std::to_string(count) + trans + ".shared.b16";
  };
  for (const bool trans : {false, true}) {
    together(name("ldmatrix", trans ? ".trans" : ""), 1 + count, [=](Warp& w, const Operands& o) {
      for (unsigned i = 0; i < count; ++i) {
        uint16_t m[8][8];
        for (int r = 0; r < 8; ++r) {
          w.shared.load(kWarp + w.number, address_of(w, o[count], 8 * i + r, true), m[r], 16);
        }
        for (int l = 0; l < 32; ++l) {
          const int a = l / 4, b = 2 * (l % 4);
          const uint32_t low = trans ? m[b][a] : m[a][b], high = trans ? m[b + 1][a] : m[a][b + 1];
          w.registers[o[i].reg][l] = low | high << 16;
        }
      }
    });
  }
  together(name("stmatrix", ""), 1 + count, [=](Warp& w, const Operands& o) {
    for (unsigned i = 0; i < count; ++i) {
      uint32_t m[8][4];
      for (int l = 0; l < 32; ++l) m[l / 4][l % 4] = uint32_t(w.registers[o[1 + i].reg][l]);
      for (int r = 0; r < 8; ++r) {
        w.shared.store(kWarp + w.number, address_of(w, o[0], 8 * i + r, true), m[r], 16);
      }
    }
  });
}

// d = a b + c, of 16 x 16, 16 x 8 and 16 x 8; registers 0 to 3 are d, 4 to 7 a, 8 and 9 b, then c.
template <class T>
void multiply(const string& type) {
  const string name = "mma.sync.aligned.m16n8k16.row.col.f32." + type + "." + type + ".f32";
  together(name, 14, [](Warp& w, const Operands& o) {
    float a[16][16], b[16][8], c[16][8];
    const auto each = [&](auto f) {
      for (int l = 0; l < 32; ++l) {
        for (int high = 0; high < 2; ++high) f(l, l / 4, 2 * (l % 4) + high, high);
      }
    };
    const auto half = [&](int reg, int l, int high) {
      return float(get<T>(w.registers[o[reg].reg][l] >> 16 * high));
    };
    each([&](int l, int row, int column, int high) {
      for (int i = 0; i < 4; ++i) a[row + 8 * (i % 2)][column + 8 * (i / 2)] = half(4 + i, l, high);
      for (int i = 0; i < 2; ++i) {
        b[column + 8 * i][row] = half(8 + i, l, high);
        c[row + 8 * i][column] = get<float>(w.registers[o[10 + 2 * i + high].reg][l]);
      }
    });
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 8; ++j) {
        for (int k = 0; k < 16; ++k) c[i][j] += a[i][k] * b[k][j];
      }
    }
    each([&](int l, int row, int column, int high) {
      for (int i = 0; i < 2; ++i) w.registers[o[2 * i + high].reg][l] = put(c[row + 8 * i][column]);
    });
  });
}

// A register from its parts, and its parts from it.
void parts(unsigned width, unsigned count) {
  const string name = std::to_string(count) + ".b" + std::to_string(width * count);
  const uint64_t mask = ~uint64_t(0) >> (64 - width);
  const auto pack = [=](Warp& w, const Operands& o, uint32_t lanes) {
    each_lane(lanes, [&](int lane) {
      uint64_t all = 0;
      for (unsigned i = 0; i < count; ++i) {
        all |= (w.registers[o[1 + i].reg][lane] & mask) << i * width;
      }
      w.registers[o[0].reg][lane] = all;
    });
  };
  const auto unpack = [=](Warp& w, const Operands& o, uint32_t lanes) {
    each_lane(lanes, [&](int lane) {
      const uint64_t all = w.registers[o[count].reg][lane];
      for (unsigned i = 0; i < count; ++i) w.registers[o[i].reg][lane] = all >> i * width & mask;
    });
  };
  table["pack" + name] = {1 + count, pack};
  table["unpack" + name] = {1 + count, unpack};
}

void control() {
  table["bra"] = {1, [](Warp& w, const Operands& o, uint32_t lanes) {
                    each_lane(lanes, [&](int lane) { w.places[lane] = size_t(o[0].offset); });
                    w.apart = true;
                  }};
  table["trap"] = {0, [](Warp&, const Operands&, uint32_t) { fault("trap"); }};
  together("ret", 0, [](Warp& w, const Operands&) { w.done = true; });
  together("bar.sync", 1, [](Warp& w, const Operands& o) {
    if (w.registers[o[0].reg][0]) fault("a barrier of some threads");
    w.waiting = true;
  });
}

bool fill_table() {
  untyped<bool>("pred");
  untyped<uint16_t>("b16");
  untyped<uint32_t>("b32");
  untyped<uint64_t>("b64");
  integer<int16_t>("s16");
  integer<uint16_t>("u16");
  integer<int32_t>("s32");
  integer<uint32_t>("u32");
  integer<int64_t>("s64");
  integer<uint64_t>("u64");
  floating<float>("f32");
  floating<double>("f64");
  floating<Half>("f16");
  floating<BFloat>("bf16");
  pairs<Half>("f16");
  pairs<BFloat>("bf16");
  define<uint32_t, uint32_t>("popc.b32", [](uint32_t a) { return __builtin_popcount(a); });
  define<uint32_t, uint32_t, uint32_t, uint32_t>(
      "prmt.b32", [](uint32_t a, uint32_t b, uint32_t how) {
        const uint64_t from = uint64_t(b) << 32 | a;
        uint32_t out = 0;
        for (int i = 0; i < 4; ++i, how >>= 4) {
          const uint32_t byte = from >> 8 * (how & 7) & 255;
          out |= (how & 8 ? (byte >> 7) * 255 : byte) << 8 * i;
        }
        return out;
      });
  define<uint64_t, uint32_t>("cvt.u64.u32", [](uint32_t a) { return a; });
  define<int64_t, int32_t>("cvt.s64.s32", [](int32_t a) { return a; });
  define<uint32_t, uint64_t>("cvt.u32.u64", [](uint64_t a) { return a; });
  define<uint16_t, uint32_t>("cvt.u16.u32", [](uint32_t a) { return a; });
  define<uint32_t, uint16_t>("cvt.u32.u16", [](uint16_t a) { return a; });
  define<float, double>("cvt.rn.f32.f64", [](double a) { return a; });
  define<double, float>("cvt.f64.f32", [](float a) { return a; });
  define<float, int32_t>("cvt.rn.f32.s32", [](int32_t a) { return a; });
  define<double, int32_t>("cvt.rn.f64.s32", [](int32_t a) { return a; });
  define<float, float>("abs.ftz.f32", [](float a) { return flush(std::fabs(a)); });
  define<float, float>("ex2.approx.f32",
                       [](float a) { return a == 0 ? 1 : approximate(std::exp2(double(a))); });
  define<float, float>("sqrt.approx.ftz.f32",
                       [](float a) { return approximate(std::sqrt(double(flush(a)))); });
  define<float, float, float>("div.full.f32",
                              [](float a, float b) { return approximate(double(a) / b); });
  shuffles();
  reduce<int32_t>("add.s32",
                  [](int32_t a, int32_t b) { return int32_t(uint32_t(a) + uint32_t(b)); });
  reduce<int32_t>("min.s32", [](int32_t a, int32_t b) { return std::min(a, b); });
  reduce<int32_t>("max.s32", [](int32_t a, int32_t b) { return std::max(a, b); });
  reduce<uint32_t>("min.u32", [](uint32_t a, uint32_t b) { return std::min(a, b); });
  for (const char* space : {"global", "shared", "shared::cta"}) {
    for (const unsigned width : {1, 2, 4, 8}) {
      for (unsigned count = 1; count <= 4 && count * width <= 16; count *= 2)
        memory(space, count, width);
    }
  }
  memory("shared", 1, 4, true);  // into a register of 64 bits
  copies();
  matrices(1);
  matrices(2);
  matrices(4);
  multiply<Half>("f16");
  multiply<BFloat>("bf16");
  parts(16, 2);
  parts(16, 4);
  parts(32, 2);
  parts(8, 4);
  control();
  return true;
}

// ------------------------------------------------------------------------------ execution

// Lines as program.py writes them.
Program read_program(std::istream& in) {
  Program program;
  string kind;
  while (in >> kind) {
    if (kind == "size") {
      in >> program.registers >> program.threads;
    } else if (kind == "constant") {
      std::pair<int, uint64_t> constant;
      in >> constant.first >> constant.second;
      program.constants.push_back(constant);
    } else if (kind == "parameter") {
      program.parameters.emplace_back();
      in >> program.parameters.back();
    } else {
      Instruction i;
      i.op = kind;
      size_t operands;
      in >> i.predicate >> i.negated >> operands;
      i.operands.resize(operands);
      for (Operand& o : i.operands) in >> o.reg >> o.offset;
      std::getline(in >> std::ws, i.text);
      const auto found = table.find(i.op);
      if (found == table.end() || found->second.operands != operands) {
        fault("unknown instruction " + i.op + ": " + i.text);
      }
      i.known = &found->second;
      program.instructions.push_back(i);
    }
  }
  return program;
}

// The lanes that go on: those that are behind, of the ones not held.
uint32_t choose_lanes(Warp& w) {
  if (!w.apart) return kAll;
  w.next = SIZE_MAX;
  each_lane(~w.held, [&](int lane) { w.next = std::min(w.next, w.places[lane]); });
  if (w.next == SIZE_MAX) fault("not all lanes reach a warp's operation");
  uint32_t lanes = 0;
  for (int lane = 0; lane < 32; ++lane) lanes |= uint32_t(w.places[lane] == w.next) << lane;
  if (lanes == kAll) w.apart = false, w.held = 0;
  return lanes;
}

void run_warp(const Program& program, Warp& w) {
  for (int64_t count = 0; !w.waiting && !w.done; ++count) {
    if (count == kLongest) fault("never ends");
    const uint32_t here = choose_lanes(w);
    const Instruction& in = program.instructions.at(w.next);
    if (in.known->together && here != kAll) {
      w.held |= here;
      continue;
    }
    uint32_t lanes = here;
    if (in.predicate >= 0) {
      const Row& predicate = w.registers[in.predicate];
      for (int lane = 0; lane < 32; ++lane) {
        lanes &= ~(uint32_t((predicate[lane] & 1) == in.negated) << lane);
      }
    }
    ++w.next;
    each_lane(here, [&](int lane) { w.places[lane] = w.next; });
    try {
      if (lanes) in.known->step(w, in.operands, lanes);
    } catch (const std::exception& error) {
      fault(error.what() + string(" in `") + in.text + "`");
    }
  }
}

void run_block(const Program& program, const uint64_t* parameters, Global global, uint64_t ctaid,
               uint64_t shared_bytes) {
  Shared shared;
  shared.bytes.resize(shared_bytes);
  std::vector<Warp> warps;
  for (int number = 0; number < program.threads / 32; ++number) {
    // Registers that nothing wrote have bits of no meaning.
    Warp w{global, shared, std::vector<Row>(program.registers), number};
    for (Row& row : w.registers) row.fill(0xA5A5A5A5A5A5A5A5);
    for (int lane = 0; lane < 32; ++lane) w.registers[kTid][lane] = number * 32 + lane;
    w.registers[kCtaid].fill(ctaid);
    for (const auto& [reg, value] : program.constants) w.registers[reg].fill(value);
    for (size_t i = 0; i < program.parameters.size(); ++i)
      w.registers[program.parameters[i]].fill(parameters[i]);
    warps.push_back(std::move(w));
  }
  for (;; ++shared.stretch) {
    size_t done = 0;
    for (Warp& w : warps) {
      w.waiting = false;
      run_warp(program, w);
      done += w.done;
    }
    if (done == warps.size()) return;
    if (done) fault("some warps end where others wait for them");
  }
}

string message;

}  // namespace

extern "C" {

const char* ptx_error() { return message.c_str(); }

void* ptx_load(const char* text) {
  try {
    static const bool filled = fill_table();
    (void)filled;
    std::istringstream in(text);
    return new Program(read_program(in));
  } catch (const std::exception& error) {
    message = error.what();
    return nullptr;
  }
}

void ptx_free(void* program) { delete static_cast<Program*>(program); }

int ptx_run(const void* program, const uint64_t* parameters, const Region* regions, int64_t count,
            int64_t programs, int64_t shared_bytes) {
  for (int64_t p = 0; p < programs; ++p) {
    try {
      run_block(*static_cast<const Program*>(program), parameters, Global{regions, count}, p,
                shared_bytes);
    } catch (const std::exception& error) {
      message = "program " + std::to_string(p) + ": " + error.what();
      return 1;
    }
  }
  return 0;
}

}  // extern "C"
