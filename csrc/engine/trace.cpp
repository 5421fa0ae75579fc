#include "engine/trace.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstring>

namespace hvd_backup {

namespace {

void append_number(std::string& out, std::int64_t value) {
  char text[24];
  out.append(text, std::to_chars(text, text + sizeof text, value).ptr);
}

// The shortest text that reads back as the same number. JSON has no infinities and no NaN.
void append_number(std::string& out, double value) {
  char text[40];
  if (!std::isfinite(value)) {
    out += "null";
    return;
  }
  out.append(text, std::to_chars(text, text + sizeof text, value).ptr);
}

void append_quoted(std::string& out, const std::string& text) {
  constexpr char hex[] = "0123456789abcdef";
  out += '"';
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (byte < 0x20) {
      out += "\\u00";
      out += hex[byte >> 4];
      out += hex[byte & 15];
    } else {
      out += c;
    }
  }
  out += '"';
}

// Metadata is opaque: as text when that is what it is, otherwise as hexadecimal digits.
void append_metadata(std::string& out, const std::string& metadata) {
  constexpr char hex[] = "0123456789abcdef";
  const bool is_ascii = std::all_of(metadata.begin(), metadata.end(), [](char c) { return c >= 0x20 && c < 0x7f; });
  if (is_ascii) {
    out += ", \"metadata\": ";
    append_quoted(out, metadata);
    return;
  }
  out += ", \"metadata_hex\": \"";
  for (const char c : metadata) {
    out += hex[static_cast<unsigned char>(c) >> 4];
    out += hex[static_cast<unsigned char>(c) & 15];
  }
  out += '"';
}

template <class T>
void append_field(std::string& out, const char* name, T value) {
  out += ", \"";
  out += name;
  out += "\": ";
  if constexpr (std::is_floating_point_v<T>) {
    append_number(out, value);
  } else {
    append_number(out, static_cast<std::int64_t>(value));
  }
}

template <class T>
void append_list(std::string& out, const char* name, const std::vector<T>& list, T origin = 0) {
  if (list.empty()) return;
  out += ", \"";
  out += name;
  out += "\": [";
  for (std::size_t i = 0; i < list.size(); ++i) {
    if (i > 0) out += ", ";
    if constexpr (std::is_floating_point_v<T>) {
      append_number(out, list[i]);
    } else {
      append_number(out, static_cast<std::int64_t>(list[i] - origin));
    }
  }
  out += ']';
}

}  // namespace

std::string to_json(const TraceHeader& header) {
  std::string out = "{\"event\": \"header\", \"format\": \"hvd_backup trace\", \"version\": 1";
  append_field(out, "size", header.size);
  append_field(out, "began_unix_s", header.began_unix_s);
  return out + "}\n";
}

std::string to_json(const Record& record, TimeUs began_us, bool with_metadata) {
  const bool is_final = record.event == Record::Event::final_;
  std::string out = "{\"t_us\": ";
  append_number(out, record.at - began_us);
  out += ", \"event\": \"";
  out += name_of(record.event);
  out += "\", \"channel\": ";
  append_quoted(out, record.channel);
  append_field(out, "step", record.step);
  append_field(out, "scope", record.scope);
  append_field(out, "attempt", record.attempt);
  append_list(out, "ranks", record.ranks);
  append_list(out, "bases", record.bases);
  append_list(out, is_final ? "done_us" : "arrivals_us", record.arrivals, began_us);
  if (record.event == Record::Event::decision) {
    append_field(out, "opened_us", record.opened_at - began_us);
    append_field(out, "required", record.required);
    append_list(out, "weights", record.weights);
    if (with_metadata) append_metadata(out, record.metadata);
  }
  if (record.event == Record::Event::chosen) append_field(out, "required", record.required);
  if (is_final && record.squares.mean > 0) {
    append_field(out, "contribution_squares", record.squares.contributions);
    append_field(out, "mean_squares", record.squares.mean);
  }
  if (record.event == Record::Event::opened) {
    out += record.kind == ChannelKind::training ? ", \"kind\": \"training\"" : ", \"kind\": \"collective\"";
    append_field(out, "required", record.options.required);
    append_field(out, "grace_us", record.options.grace_us);
    append_field(out, "max_misses", record.options.max_misses);
    append_field(out, "max_lag", record.options.max_lag);
    out += record.options.automatic ? ", \"automatic\": true" : ", \"automatic\": false";
  }
  if (!record.reason.empty()) {
    out += record.event == Record::Event::opened ? ", \"description\": " : ", \"reason\": ";
    append_quoted(out, record.reason);
  }
  return out + "}\n";
}

Trace::Trace(const std::string& path, const TraceHeader& header) : header_(header) {
  if (path.empty()) return;
  file_.reset(std::fopen(path.c_str(), "we"));
  if (!file_) throw UsageError("the trace can't be written to '" + path + "': " + std::strerror(errno));
  lines_ = to_json(header);
  write({});
}

void Trace::write(const std::vector<Record>& records) {
  if (!file_) return;
  for (const Record& record : records) {
    bool with_metadata = false;
    if (record.event == Record::Event::decision && record.scope == 0) {  // the update's metadata is that of scope 0
      const auto [last, is_first] = metadata_.try_emplace(record.channel, record.metadata);
      with_metadata = is_first || last->second != record.metadata;
      last->second = record.metadata;
    }
    lines_ += to_json(record, header_.began_us, with_metadata);
  }
  if (lines_.empty()) return;
  const bool all = std::fwrite(lines_.data(), 1, lines_.size(), file_.get()) == lines_.size();
  if (!all || std::fflush(file_.get()) != 0) {
    std::fprintf(stderr, "[hvd_backup rank 0] warning: the trace ends here: %s\n", std::strerror(errno));
    file_.reset();
  }
  lines_.clear();
}

void Recording::keep(const std::vector<Record>& records) {
  for (const Record& record : records) {
    if (record.event == Record::Event::opened) {
      opened_.push_back(record);
      continue;
    }
    bytes_ += record.bytes();
    records_.push_back(record);
  }
  while (bytes_ > most_bytes) {
    bytes_ -= records_.front().bytes();
    records_.pop_front();
  }
}

std::string Recording::text(Step last) const {
  std::map<std::string, Step> newest;
  for (const Record& record : records_) {
    if (record.event == Record::Event::decision) newest[record.channel] = record.step;
  }
  std::string out = to_json(header_);
  for (const Record& record : opened_) out += to_json(record, header_.began_us, false);
  for (const Record& record : records_) {
    const bool is_old = record.step < newest[record.channel] - last;  // one more, whose end is the next one's beginning
    if (!is_old) out += to_json(record, header_.began_us, false);
  }
  return out;
}

}  // namespace hvd_backup
