-- Arguments: method, path, body; "{id}" stands for a task's id out of a range, "{n}" for another number each time, in
-- each run: a change that was made before would change nothing.
local method, path, body, ids
local number = os.time() % 100000 * 1000000

function init(arguments)
  method, path, body, ids = arguments[1], arguments[2], arguments[3], tonumber(arguments[4])
  math.randomseed(os.time())
  if body ~= "" then wrk.headers["Content-Type"] = "application/json" end
end

function request()
  number = number + 1
  local text = body ~= "" and body:gsub("{n}", number) or nil
  return wrk.format(method, (path:gsub("{id}", function() return math.random(ids) end)), nil, text)
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\n{"requests": %d, "seconds": %f, "p50": %f, "p99": %f, "failed": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
