"""The queue's transitions as Lua scripts: each runs whole or not at all, so no crash leaves a half state.

Time is Redis' own (`TIME`), never a worker's. Commands are those of Redis 6.2. Every script may be sent twice (a reply
can be lost): the second time it knows its own work by the fence or the claim's token. Other keys are built from the
prefix, so Redis Cluster is not supported.

ARGV of every script: 1 prefix, 2 events kept, 3 inbox messages kept, then its own.
"""

from __future__ import annotations

GROUP = "workers"
"""Consumer group of every queue stream."""

_PREAMBLE = """
local prefix, events_kept, inbox_kept = ARGV[1], ARGV[2], ARGV[3]
local clock = redis.call('TIME')
local now = clock[1] .. '.' .. string.format('%06d', tonumber(clock[2]))
local now_ms = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)

local FIELDS = {'id', 'queue', 'kind', 'topic', 'state', 'fence', 'attempts', 'max_attempts', 'entry', 'cancel',
                'token', 'started_at', 'worker'}

local function read_job(key)
  local values = redis.call('HMGET', key, unpack(FIELDS))
  if not values[1] then return nil end
  local job = {key = key}
  for i, name in ipairs(FIELDS) do job[name] = values[i] or '' end
  return job
end

local function stream_of(job) return prefix .. ':queue:' .. job.queue end
local function delayed_of(job) return prefix .. ':delayed:' .. job.queue end

local function emit(job, what, data)
  redis.call('XADD', prefix .. ':events:' .. job.topic, 'MAXLEN', '~', events_kept, '*',
             'type', what, 'job_id', job.id, 'kind', job.kind, 'data', data)
end

local function drop_entry(job)
  if job.entry ~= '' then
    redis.call('XACK', stream_of(job), 'workers', job.entry)
    redis.call('XDEL', stream_of(job), job.entry)
    redis.call('HDEL', job.key, 'entry')
    job.entry = ''
  end
  redis.call('ZREM', delayed_of(job), job.id)
end

local function push(job, delay_ms)
  redis.call('HSET', job.key, 'state', 'queued')
  redis.call('HDEL', job.key, 'worker', 'token', 'progress')
  if delay_ms > 0 then
    redis.call('ZADD', delayed_of(job), now_ms + delay_ms, job.id)
  else
    redis.call('HSET', job.key, 'entry', redis.call('XADD', stream_of(job), '*', 'job', job.id))
  end
end

local function end_job(job, state, data)
  drop_entry(job)
  redis.call('HSET', job.key, 'state', state, 'finished_at', now)
  redis.call('HDEL', job.key, 'token')
  emit(job, 'job.' .. state, data)
  redis.call('XADD', prefix .. ':inbox', 'MAXLEN', '~', inbox_kept, '*',
             'job_id', job.id, 'topic', job.topic, 'state', state)
end

local function figures(job)
  local data = {attempt = tonumber(job.attempts)}
  if job.started_at ~= '' then data.seconds = tonumber(now) - tonumber(job.started_at) end
  return cjson.encode(data)
end

local function whole(key) return redis.call('HGETALL', key) end

local function mine(job, fence) return job and job.fence == fence end
"""

_SCRIPTS = {
    # KEYS 1 job; ARGV 4 id, 5 queue, 6 kind, 7 payload, 8 topic, 9 max_attempts -> {status, hash}
    "enqueue": """
if redis.call('EXISTS', KEYS[1]) == 1 then
  local old = redis.call('HMGET', KEYS[1], 'queue', 'kind', 'payload')
  if old[1] ~= ARGV[5] or old[2] ~= ARGV[6] or old[3] ~= ARGV[7] then return {'CONFLICT', whole(KEYS[1])} end
  return {'OLD', whole(KEYS[1])}
end
redis.call('HSET', KEYS[1], 'id', ARGV[4], 'queue', ARGV[5], 'kind', ARGV[6], 'payload', ARGV[7], 'topic', ARGV[8],
           'max_attempts', ARGV[9], 'fence', 0, 'attempts', 0, 'cancel', 0, 'enqueued_at', now)
local job = read_job(KEYS[1])
push(job, 0)
local now_us = string.format('%.0f', tonumber(clock[1]) * 1000000 + tonumber(clock[2]))
redis.call('ZADD', prefix .. ':jobs:' .. job.queue, now_us, job.id)
emit(job, 'job.queued', cjson.encode({queue = job.queue}))
return {'NEW', whole(KEYS[1])}
""",
    # KEYS 1 delayed set, 2 stream; ARGV 4 at most -> ms until the next is due, -1: none waits
    "promote": """
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now_ms, 'LIMIT', 0, ARGV[4])) do
  redis.call('ZREM', KEYS[1], id)
  local job = read_job(prefix .. ':job:' .. id)
  if job and job.state == 'queued' and job.entry == '' then
    redis.call('HSET', job.key, 'entry', redis.call('XADD', KEYS[2], '*', 'job', id))
  end
end
local next = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
if not next[2] then return -1 end
return math.max(0, tonumber(next[2]) - now_ms)
""",
    # KEYS 1 job, 2 stream; ARGV 4 entry, 5 worker, 6 token -> {status, hash}
    "claim": """
local job = read_job(KEYS[1])
if job and job.state == 'running' and job.token == ARGV[6] then return {'OK', whole(KEYS[1])} end
if not job or job.state ~= 'queued' or job.entry ~= ARGV[4] then
  if not job or job.entry ~= ARGV[4] then
    redis.call('XACK', KEYS[2], 'workers', ARGV[4])
    redis.call('XDEL', KEYS[2], ARGV[4])
  end
  return {'STALE', {}}
end
local fence = redis.call('HINCRBY', KEYS[1], 'fence', 1)
local attempt = redis.call('HINCRBY', KEYS[1], 'attempts', 1)
redis.call('HSET', KEYS[1], 'state', 'running', 'worker', ARGV[5], 'token', ARGV[6], 'started_at', now)
redis.call('HDEL', KEYS[1], 'progress', 'event_ms', 'unsent')
emit(job, 'job.started', cjson.encode({worker = ARGV[5], attempt = attempt, fence = fence}))
return {'OK', whole(KEYS[1])}
""",
    # KEYS 1 job; ARGV 4 fence, 5 entry, 6 worker, 7 progress or '', 8 ms between events -> OK, CANCEL, LOST
    "heartbeat": """
local job = read_job(KEYS[1])
if not mine(job, ARGV[4]) or job.state ~= 'running' then return 'LOST' end
redis.call('XCLAIM', stream_of(job), 'workers', ARGV[6], 0, ARGV[5], 'IDLE', 0, 'JUSTID')
if ARGV[7] ~= '' then redis.call('HSET', KEYS[1], 'progress', ARGV[7], 'unsent', 1) end
local sent = redis.call('HMGET', KEYS[1], 'unsent', 'event_ms', 'progress')
if sent[1] and now_ms - tonumber(sent[2] or 0) >= tonumber(ARGV[8]) then
  redis.call('HSET', KEYS[1], 'event_ms', now_ms)
  redis.call('HDEL', KEYS[1], 'unsent')
  emit(job, 'job.progress', sent[3])
end
if job.cancel == '1' then return 'CANCEL' end
return 'OK'
""",
    # KEYS 1 job; ARGV 4 fence, 5 result, 6 progress or '' -> OK, FENCED
    "finish": """
local job = read_job(KEYS[1])
if not mine(job, ARGV[4]) then return 'FENCED' end
if job.state == 'succeeded' then return 'OK' end
if job.state ~= 'running' then return 'FENCED' end
redis.call('HSET', KEYS[1], 'result', ARGV[5])
redis.call('HDEL', KEYS[1], 'problem')
if ARGV[6] ~= '' then redis.call('HSET', KEYS[1], 'progress', ARGV[6]) end
end_job(job, 'succeeded', figures(job))
return 'OK'
""",
    # KEYS 1 job; ARGV 4 fence, 5 problem, 6 retry 0 or 1, 7 delay ms -> {status, hash}
    "fail": """
local job = read_job(KEYS[1])
if not mine(job, ARGV[4]) then return {'FENCED', {}} end
if job.state == 'failed' or job.state == 'queued' or job.state == 'cancelled' then return {'OK', whole(KEYS[1])} end
if job.state ~= 'running' then return {'FENCED', {}} end
redis.call('HSET', KEYS[1], 'problem', ARGV[5])
local again = ARGV[6] == '1'
if again and job.cancel == '1' then
  end_job(job, 'cancelled', figures(job))
elseif again and tonumber(job.attempts) < tonumber(job.max_attempts) then
  drop_entry(job)
  push(job, tonumber(ARGV[7]))
  emit(job, 'job.retrying', '{"attempt":' .. job.attempts .. ',"delay_seconds":' .. tonumber(ARGV[7]) / 1000
    .. ',"problem":' .. ARGV[5] .. '}')
else
  end_job(job, 'failed', '{"attempt":' .. job.attempts .. ',"problem":' .. ARGV[5] .. '}')
end
return {'OK', whole(KEYS[1])}
""",
    # KEYS 1 job; ARGV 4 fence -> OK, FENCED
    "finish_cancelled": """
local job = read_job(KEYS[1])
if not mine(job, ARGV[4]) then return 'FENCED' end
if job.state == 'cancelled' then return 'OK' end
if job.state ~= 'running' then return 'FENCED' end
end_job(job, 'cancelled', figures(job))
return 'OK'
""",
    # KEYS 1 job; ARGV 4 fence -> OK, FENCED
    "release": """
local job = read_job(KEYS[1])
if not mine(job, ARGV[4]) then return 'FENCED' end
if job.state == 'queued' or job.state == 'cancelled' then return 'OK' end
if job.state ~= 'running' then return 'FENCED' end
if job.cancel == '1' then
  end_job(job, 'cancelled', figures(job))
  return 'OK'
end
drop_entry(job)
redis.call('HINCRBY', KEYS[1], 'attempts', -1)
redis.call('HDEL', KEYS[1], 'started_at')
push(job, 0)
emit(job, 'job.queued', cjson.encode({queue = job.queue, released_by = job.worker}))
return 'OK'
""",
    # KEYS 1 stream; ARGV 4 lease ms, 5 at most, 6 ms until an idle consumer's name is forgotten
    # -> {entries taken back, jobs queued again, jobs failed}
    # Owners need one lease after a restart of Redis to renew; idle times include the time it was down.
    "reclaim": """
local uptime = tonumber(string.match(redis.call('INFO', 'server'), 'uptime_in_seconds:(%d+)'))
if uptime * 1000 <= tonumber(ARGV[4]) then return {0, 0, 0} end
local requeued, failed = 0, 0
local taken = redis.call('XPENDING', KEYS[1], 'workers', 'IDLE', ARGV[4], '-', '+', ARGV[5])
for _, pending in ipairs(taken) do
  local entry = pending[1]
  local found = redis.call('XRANGE', KEYS[1], entry, entry)
  local job = found[1] and read_job(prefix .. ':job:' .. found[1][2][2])
  if not job or job.entry ~= entry then
    redis.call('XACK', KEYS[1], 'workers', entry)
    redis.call('XDEL', KEYS[1], entry)
  else
    local dead = job.state == 'running'
    drop_entry(job)
    if dead then redis.call('HINCRBY', job.key, 'fence', 1) end
    if dead and job.cancel == '1' then
      end_job(job, 'cancelled', figures(job))
    elseif dead and tonumber(job.attempts) >= tonumber(job.max_attempts) then
      local problem = cjson.encode({
        type = 'urn:ratchet:problem:worker-lost', title = 'Worker lost', status = 500, code = 'worker-lost',
        detail = 'job ' .. job.id .. ': worker ' .. job.worker .. ' stopped answering, and all ' .. job.attempts
          .. ' attempts are used up. Look in its log for what ended it (out of memory, a crash), then retry the job.'})
      redis.call('HSET', job.key, 'problem', problem)
      end_job(job, 'failed', '{"attempt":' .. job.attempts .. ',"problem":' .. problem .. '}')
      failed = failed + 1
    else
      push(job, 0)
      if dead then
        requeued = requeued + 1
        emit(job, 'job.queued', cjson.encode({queue = job.queue, lost_by = job.worker}))
      end
    end
  end
end
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], 'workers')) do
  local about = {}
  for i = 1, #consumer, 2 do about[consumer[i]] = consumer[i + 1] end
  if about.pending == 0 and about.idle > tonumber(ARGV[6]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], 'workers', about.name)
  end
end
return {#taken, requeued, failed}
""",
    # KEYS 1 job -> hash, empty when there is none
    "cancel": """
local job = read_job(KEYS[1])
if not job then return {} end
if job.state == 'queued' then
  redis.call('HSET', KEYS[1], 'cancel', 1)
  end_job(job, 'cancelled', cjson.encode({attempt = tonumber(job.attempts)}))
elseif job.state == 'running' and job.cancel ~= '1' then
  redis.call('HSET', KEYS[1], 'cancel', 1)
  emit(job, 'job.cancelling', cjson.encode({attempt = tonumber(job.attempts)}))
end
return whole(KEYS[1])
""",
    # KEYS 1 job -> hash, empty when there is none
    "retry": """
local job = read_job(KEYS[1])
if not job then return {} end
if job.state == 'failed' or job.state == 'cancelled' then
  redis.call('HSET', KEYS[1], 'attempts', 0, 'cancel', 0)
  redis.call('HDEL', KEYS[1], 'problem', 'result', 'started_at', 'finished_at')
  push(job, 0)
  emit(job, 'job.queued', cjson.encode({queue = job.queue, retried = true}))
end
return whole(KEYS[1])
""",
}

SCRIPTS: dict[str, str] = {name: _PREAMBLE + body for name, body in _SCRIPTS.items()}
"""Name of a transition -> its whole Lua source."""
