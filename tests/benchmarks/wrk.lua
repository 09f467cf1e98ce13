-- Arguments: method, path, body, the number of tasks of each user, the first user's lowest id, and a file with a token of
-- each user in a line. Without a file, there are no tokens. "{id}" stands for the id of one of the user's tasks, "{n}"
-- for another number each time, in each run: a change that was made before would change nothing.
local method, path, body, tasks, first, file
local tokens = {}
local number = os.time() % 100000 * 1000000

function init(arguments)
  method, path, body, tasks, first, file = unpack(arguments)
  math.randomseed(os.time())
  if body ~= "" then wrk.headers["Content-Type"] = "application/json" end
  if file then
    for token in io.lines(file) do tokens[#tokens + 1] = token end
  end
end

function request()
  number = number + 1
  local user = number % math.max(#tokens, 1)
  if file then wrk.headers["Authorization"] = "Bearer " .. tokens[user + 1] end
  local text = body ~= "" and body:gsub("{n}", number) or nil
  local id = function() return string.format("%d", first + user * tasks + math.random(0, tasks - 1)) end
  return wrk.format(method, (path:gsub("{id}", id)), nil, text)
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\n{"requests": %d, "seconds": %f, "p50": %f, "p99": %f, "failed": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
