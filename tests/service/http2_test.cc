// Hostile HTTP/2, written byte by byte: odd headers, floods of pings and of reset streams, connections that never get
// going. Each costs its own connection at most: a client of its own is answered before, meanwhile and after.
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <optional>

#include "tests/service/service_fixture.h"

namespace refocus {
namespace {

using Clock = std::chrono::steady_clock;
using Headers = std::map<std::string, std::string>;  // ':' sorts before letters: pseudo-headers come first

enum FrameType : uint8_t { kData = 0, kHeaders = 1, kReset = 3, kSettings = 4, kPing = 6, kGoAway = 7 };
constexpr uint8_t kEndStream = 1, kEndHeaders = 4;
const std::string kPreface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const std::string kSettingsFrame(std::string("\0\0\0\4\0\0\0\0\0", 9));

struct Frame {
  uint8_t type = 0;
  uint8_t flags = 0;
  uint32_t stream = 0;
  std::string payload;
};

std::string Encode(const Frame& frame) {
  const auto length = static_cast<uint32_t>(frame.payload.size());
  std::string bytes;
  for (const int shift : {16, 8, 0}) bytes.push_back(static_cast<char>(length >> shift));
  bytes.push_back(static_cast<char>(frame.type));
  bytes.push_back(static_cast<char>(frame.flags));
  for (const int shift : {24, 16, 8, 0}) bytes.push_back(static_cast<char>(frame.stream >> shift));
  return bytes + frame.payload;
}

// Every field as a literal that enters no table.
std::string Block(const Headers& headers) {
  std::string block;
  for (const auto& [name, value] : headers) {
    block += '\0';
    for (const std::string& text : {name, value}) block += static_cast<char>(text.size()) + text;
  }
  return block;
}

Headers GoodHeaders(const std::string& method) {
  return {{":method", "POST"}, {":scheme", "http"},  {":path", "/refocus.v1." + method},
          {":authority", "x"}, {"te", "trailers"}, {"content-type", "application/grpc"}};
}

class RawConnection {
 public:
  RawConnection(const std::string& address, const std::string& first_bytes) : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in to{};
    to.sin_family = AF_INET;
    to.sin_port = htons(static_cast<uint16_t>(std::stoi(address.substr(address.rfind(':') + 1))));
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(connect(fd_, reinterpret_cast<sockaddr*>(&to), sizeof(to)), 0);
    Send(first_bytes);
  }
  ~RawConnection() { close(fd_); }
  RawConnection(const RawConnection&) = delete;
  RawConnection& operator=(const RawConnection&) = delete;

  // false: the server has closed the connection. Reads on while it cannot write, as the server may wait for that.
  bool Send(const std::string& bytes) {
    for (size_t sent = 0; sent < bytes.size();) {
      pollfd ready{fd_, POLLIN | POLLOUT, 0};
      poll(&ready, 1, 1000);
      if ((ready.revents & POLLIN) != 0) Receive();
      if (closed_) return false;
      if ((ready.revents & POLLOUT) == 0) continue;
      const ssize_t n = send(fd_, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n > 0) sent += static_cast<size_t>(n);
      if (n < 0 && errno != EAGAIN) closed_ = true;
    }
    return true;
  }
  bool Send(const Frame& frame) { return Send(Encode(frame)); }

  // The next frame; nothing when the connection is closed or `seconds` have passed.
  std::optional<Frame> Next(double seconds = 10) {
    const auto until = Clock::now() + std::chrono::duration<double>(seconds);
    while (true) {
      const auto byte = [&](size_t i) { return static_cast<uint32_t>(static_cast<uint8_t>(received_[i])); };
      if (received_.size() >= 9) {
        const size_t length = byte(0) << 16 | byte(1) << 8 | byte(2);
        if (received_.size() >= 9 + length) {
          Frame frame{static_cast<uint8_t>(byte(3)), static_cast<uint8_t>(byte(4)),
                      byte(5) << 24 | byte(6) << 16 | byte(7) << 8 | byte(8), received_.substr(9, length)};
          received_.erase(0, 9 + length);
          return frame;
        }
      }
      if (closed_ || Clock::now() > until) return std::nullopt;
      pollfd ready{fd_, POLLIN, 0};
      if (poll(&ready, 1, 50) > 0) Receive();
    }
  }
  bool closed() const { return closed_; }

 private:
  void Receive() {
    char buffer[65536];
    const ssize_t n = recv(fd_, buffer, sizeof(buffer), MSG_DONTWAIT);
    if (n > 0) received_.append(buffer, static_cast<size_t>(n));
    if (n == 0 || (n < 0 && errno != EAGAIN)) closed_ = true;
  }

  const int fd_;
  std::string received_;
  bool closed_ = false;
};

// How one stream of a connection ended.
struct StreamEnd {
  bool ended = false;
  bool answered = false;  // with a message
  std::string grpc_status;  // known only for the first stream of a connection: later it is a number in a table
};

StreamEnd Call(RawConnection& connection, uint32_t stream, const Headers& headers) {
  connection.Send({kHeaders, kEndHeaders, stream, Block(headers)});
  connection.Send({kData, kEndStream, stream, std::string(5, '\0')});  // an empty message
  StreamEnd end;
  while (const auto frame = connection.Next()) {
    if (frame->stream != stream) continue;
    end.answered = end.answered || frame->type == kData;
    const size_t at = frame->payload.find("grpc-status");
    if (frame->type == kHeaders && at != std::string::npos) {
      end.grpc_status = frame->payload.substr(at + 12, static_cast<uint8_t>(frame->payload[at + 11]));
    }
    end.ended = frame->type == kReset || (frame->flags & kEndStream) != 0;
    if (end.ended) break;
  }
  return end;
}

class Http2Test : public ServiceTest {
 protected:
  void SetUp() override {
    StartServer();
    StartGroup(2);
  }
  std::string address() { return server_->public_address(); }
  void ExpectAnswerSoon() {
    const auto begin = Clock::now();
    EXPECT_TRUE(Generate(GenerateRequest("witness", "?", 2)).status.ok());
    EXPECT_LT(Clock::now() - begin, std::chrono::seconds(10));  // a tenth of it, but for sanitizers
  }
  static size_t Descriptors() {
    const std::filesystem::directory_iterator all("/proc/self/fd");
    return static_cast<size_t>(std::distance(begin(all), end(all)));
  }
};

// What the packaged gRPC makes of them: a refusal of that stream, now and then no notice; but for a value that is no
// base64, which costs the connection.
TEST_F(Http2Test, Row92OddHeaders) {
  struct Odd {
    const char* name;
    const char* value;
    const char* grpc_status;
  };
  const Odd all[] = {{"odd-bin", "no base64!", "14"}, {"te", "gzip", "2"},  {":scheme", "ftp", "2"},
                     {":method", "GET", "2"},         {":path", "x", "12"}, {":path", "", "12"},
                     {"content-type", "text/plain", "0"}, {"grpc-timeout", "soon", "0"}};
  const Headers good = GoodHeaders("ClusterService/GetCluster");
  for (const Odd& odd : all) {
    SCOPED_TRACE(std::string(odd.name) + ": " + odd.value);
    RawConnection connection(address(), kPreface + kSettingsFrame);
    Headers headers = good;
    headers[odd.name] = odd.value;
    const StreamEnd end = Call(connection, 1, headers);
    EXPECT_TRUE(end.ended);
    EXPECT_EQ(end.grpc_status, odd.grpc_status);
    EXPECT_EQ(end.answered, end.grpc_status == "0");
    const bool closes = std::string(odd.name) == "odd-bin";
    EXPECT_EQ(Call(connection, 3, good).answered, !closes);
    EXPECT_EQ(connection.closed(), closes);
  }
  ExpectUnharmed();
}

TEST_F(Http2Test, Row93PingFlood) {
  RawConnection connection(address(), kPreface + kSettingsFrame);
  for (int i = 0; i < 1000; ++i) {
    if (!connection.Send({kPing, 0, 0, std::string(8, 'p')})) break;
  }
  bool told = false;
  while (const auto frame = connection.Next()) {
    told = told || (frame->type == kGoAway && frame->payload.find("too_many_pings") != std::string::npos);
  }
  EXPECT_TRUE(told);
  EXPECT_TRUE(connection.closed());
  ExpectUnharmed();
}

// The packaged gRPC goes on serving such a connection; what it must not do is keep anything, or keep others waiting.
TEST_F(Http2Test, Row94RapidReset) {
  std::atomic<bool> over{false};
  std::thread flood([&] {
    RawConnection connection(address(), kPreface + kSettingsFrame);
    const std::string upload = Block(GoodHeaders("ContextService/CreateContext"));
    const std::string get = Block(GoodHeaders("ClusterService/GetCluster"));
    for (uint32_t stream = 1; stream < 2 * 10'000; stream += 2) {
      const std::string open = Encode({kHeaders, kEndHeaders, stream, stream % 4 == 1 ? upload : get});
      if (!connection.Send(open + Encode({kReset, 0, stream, std::string("\0\0\0\x08", 4)}))) break;
    }
    while (connection.Next(0.2)) {
    }
    over = true;
  });
  while (!over) ExpectAnswerSoon();
  flood.join();
  WaitFor([&] { return server_->hub().calls().running() == 0; });
  ExpectUnharmed();
}

// The packaged gRPC caps neither their number nor the time that a stream's headers may take.
TEST_F(Http2Test, Row95IdleConnections) {
  const size_t before = Descriptors();
  {
    std::vector<std::unique_ptr<RawConnection>> idle;
    for (int i = 0; i < 400; ++i) {
      idle.push_back(std::make_unique<RawConnection>(address(), kPreface + kSettingsFrame));
      EXPECT_TRUE(idle.back()->Next().has_value()) << i;  // its settings: the connection is up
    }
    ExpectAnswerSoon();
    EXPECT_GE(Descriptors(), before + 790);  // both ends are here
  }
  WaitFor([&] { return Descriptors() <= before + 4; });
  ExpectUnharmed();
}

TEST_F(Http2Test, Row95SlowHandshakes) {
  ServerOptions options;
  options.handshake_seconds = 0.5;
  StartServer(std::move(options));
  StartGroup(1);
  std::vector<std::unique_ptr<RawConnection>> slow;
  for (const std::string& bytes : {std::string(), kPreface.substr(0, 10), kPreface, kPreface + std::string(3, '\0')}) {
    slow.push_back(std::make_unique<RawConnection>(address(), bytes));
  }
  RawConnection fast(address(), kPreface + kSettingsFrame);
  const auto begin = Clock::now();
  for (const auto& connection : slow) {
    while (connection->Next(5)) {
    }
    EXPECT_TRUE(connection->closed());
  }
  EXPECT_GT(Clock::now() - begin, std::chrono::milliseconds(300));
  EXPECT_TRUE(Call(fast, 1, GoodHeaders("ClusterService/GetCluster")).answered);
  ExpectUnharmed();
}

}  // namespace
}  // namespace refocus
