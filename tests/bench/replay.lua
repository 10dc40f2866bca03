-- Replays requests that were signed beforehand: wrk -s replay.lua URL -- FILE
-- FILE holds them one after another, each as "<bytes>\n<request>". Says "ready" once they are
-- read and "done" once each has its answer; whoever started us then sends SIGINT.

local threads = {}

function setup(thread)
  table.insert(threads, thread)
end

function init(args)
  requests, sent, answered, statuses, count = {}, 0, 0, "", {}
  local file = assert(io.open(args[1], "rb"))
  for size in file:lines() do
    requests[#requests + 1] = file:read(tonumber(size))
  end
  file:close()
  io.stdout:write("ready\n")
  io.stdout:flush()
end

function request()
  -- wrk calls once before it starts, to have a look: that one is not sent.
  sent = sent + 1
  return requests[math.max(sent - 1, 1)]
end

function delay()
  -- Milliseconds; a connection for which no request is left rests.
  return sent > #requests and 3600000 or 0
end

function response(status)
  answered = answered + 1
  count[status] = (count[status] or 0) + 1
  if answered == #requests then
    for code, n in pairs(count) do statuses = statuses .. code .. "=" .. n .. " " end
    io.stdout:write("done\n")
    io.stdout:flush()
  end
end

function done(summary, latency)
  io.stdout:write(string.format("p50=%d p99=%d broken=%d %s\n",
    latency:percentile(50), latency:percentile(99),
    summary.errors.connect + summary.errors.read + summary.errors.timeout,
    threads[1]:get("statuses")))
end
