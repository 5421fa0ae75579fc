#include "control/messages.h"

#include <array>
#include <utility>

namespace hvd_backup {

std::vector<std::byte> encode(const Message& message) {
  Writer writer;
  writer(static_cast<std::uint8_t>(message.index()));
  std::visit([&](const auto& body) { writer(body); }, message);
  return writer.take();
}

namespace {

template <std::size_t Index>
Message decode_as(Reader& reader) {
  std::variant_alternative_t<Index, Message> body;
  reader(body);
  return body;
}

template <std::size_t... Index>
Message decode_body(std::size_t kind, Reader& reader, std::index_sequence<Index...>) {
  using Decoder = Message (*)(Reader&);
  static constexpr std::array<Decoder, sizeof...(Index)> decoders = {&decode_as<Index>...};
  if (kind >= decoders.size()) throw RuntimeFailure("malformed message: unknown kind " + std::to_string(kind));
  return decoders[kind](reader);
}

}  // namespace

Message decode(const std::vector<std::byte>& bytes) {
  Reader reader(bytes);
  std::uint8_t kind = 0;
  reader(kind);
  Message message = decode_body(kind, reader, std::make_index_sequence<std::variant_size_v<Message>>());
  reader.expect_end();
  return message;
}

}  // namespace hvd_backup
