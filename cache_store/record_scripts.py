"""What happens to keys of sessions in Redis, each time all or nothing: Lua scripts.

Those of `redis_records` come first. Their KEYS are the session's five: meta (hash), tokens (little-endian u4 string),
turns (list), lock (string with a lease), gone (set of holders that have given up: what they asked for may still be on
its way, behind a stall).
Every answer is an array whose first element is OK, MISSING, EXISTS or BUSY.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from redis.exceptions import NoScriptError


class Script(NamedTuple):
    text: str
    sha: str


async def run(redis: Any, script: Script, keys: Sequence[str], *args: Any) -> Any:
    """What the script answers. Raises what redis-py raises."""
    try:
        return await redis.evalsha(script.sha, len(keys), *keys, *args)
    except NoScriptError:  # a server that has just started
        return await redis.eval(script.text, len(keys), *keys, *args)


def script(text: str) -> Script:
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def _of_session(body: str) -> Script:
    return script(_COMMON + body)


_COMMON = """
local meta, tokens, turns, lock, gone = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]

local function missing() return redis.call('EXISTS', meta) == 0 end

-- Expiry slides with each use, and all parts of a record expire together.
local function keep()
  local ttl_s = tonumber(redis.call('HGET', meta, 'ttl_s'))
  local for_ever = ttl_s == 0 or redis.call('HGET', meta, 'pinned') == '1'
  for _, key in ipairs({meta, tokens, turns}) do
    if for_ever then redis.call('PERSIST', key) else redis.call('PEXPIRE', key, ttl_s * 1000) end
  end
end

-- A full server refuses a script's first write, and no later one. Records of sessions that are there go on when blocks
-- have filled it: this writes nothing, and is no command that is refused.
local function insist() redis.call('HDEL', meta, '') end

local function record()
  return {'OK', redis.call('HGETALL', meta), redis.call('GET', tokens) or '', redis.call('LRANGE', turns, 0, -1)}
end
"""

# ARGV: nonce, tokens, number of turns, turns..., then meta's fields and values.
CREATE = _of_session("""
if not missing() then
  -- Our own, if the answer to the first try was lost.
  return {redis.call('HGET', meta, 'nonce') == ARGV[1] and 'OK' or 'EXISTS'}
end
redis.call('DEL', tokens, turns, lock, gone)
if ARGV[2] ~= '' then redis.call('SET', tokens, ARGV[2]) end
local num_turns = tonumber(ARGV[3])
for i = 4, 3 + num_turns do redis.call('RPUSH', turns, ARGV[i]) end
redis.call('HSET', meta, 'nonce', ARGV[1])
for i = 4 + num_turns, #ARGV, 2 do redis.call('HSET', meta, ARGV[i], ARGV[i + 1]) end
keep()
return {'OK'}
""")

READ = _of_session("""
if missing() then return {'MISSING'} end
return record()
""")

# ARGV: ttl_s or '', pinned or ''; and for other banks the version that they were attached to, banks, seal or ''.
UPDATE = _of_session("""
if missing() then return {'MISSING'} end
if ARGV[3] then
  if redis.call('EXISTS', lock) == 1 or redis.call('HGET', meta, 'version') ~= ARGV[3] then return {'BUSY'} end
end
insist()
if ARGV[3] then
  redis.call('HSET', meta, 'banks', ARGV[4])
  if ARGV[5] ~= '' then redis.call('HSET', meta, 'seal', ARGV[5]) end
end
if ARGV[1] ~= '' then redis.call('HSET', meta, 'ttl_s', ARGV[1]) end
if ARGV[2] ~= '' then redis.call('HSET', meta, 'pinned', ARGV[2]) end
keep()
return record()
""")

# ARGV: holder, lease in ms, now in ms, a holder that is dead or ''.
BEGIN = _of_session("""
if missing() then return {'MISSING'} end
local holder = redis.call('GET', lock)
if holder and holder ~= ARGV[1] and holder ~= ARGV[4] then return {'BUSY', holder} end
if redis.call('SISMEMBER', gone, ARGV[1]) == 1 or redis.call('HGET', meta, 'committed_by') == ARGV[1] then
  return {'BUSY'} -- it comes late, and nobody would unlock
end
insist()
redis.call('SET', lock, ARGV[1], 'PX', ARGV[2])
redis.call('HSET', meta, 'last_used_ms', ARGV[3])
keep()
return record()
""")

# ARGV: holder, lease in ms.
RENEW = _of_session("""
if missing() then return {'MISSING'} end
if redis.call('GET', lock) ~= ARGV[1] then return {'BUSY'} end
redis.call('PEXPIRE', lock, ARGV[2])
keep()
return {'OK'}
""")

# ARGV: holder, version before, new tokens, turn, now in ms, model, worker id, whether these are all tokens and turns,
# number of all tokens, seal or ''.
COMMIT = _of_session("""
if missing() then return {'MISSING'} end
local version, before = tonumber(redis.call('HGET', meta, 'version')), tonumber(ARGV[2])
if version == before + 1 and redis.call('HGET', meta, 'committed_by') == ARGV[1] then
  return {'OK'} -- already: the answer to the first try was lost
end
if version ~= before or redis.call('GET', lock) ~= ARGV[1] then return {'BUSY'} end
insist()
if ARGV[8] == '1' then redis.call('DEL', tokens, turns) end
if ARGV[3] ~= '' then redis.call('APPEND', tokens, ARGV[3]) end
redis.call('RPUSH', turns, ARGV[4])
if ARGV[10] ~= '' then redis.call('HSET', meta, 'seal', ARGV[10]) end
redis.call('HSET', meta, 'version', before + 1, 'num_tokens', ARGV[9], 'committed_by', ARGV[1],
  'last_used_ms', ARGV[5], 'model', ARGV[6], 'worker_id', ARGV[7])
redis.call('DEL', lock)
keep()
return {'OK'}
""")

# ARGV: holder, ms for which it is remembered.
RELEASE = _of_session("""
if missing() then return {'OK'} end
if redis.call('GET', lock) == ARGV[1] then redis.call('DEL', lock) end
insist()
redis.call('SADD', gone, ARGV[1])
redis.call('PEXPIRE', gone, ARGV[2])
return {'OK'}
""")

DELETE = _of_session("""
if missing() then return {'MISSING'} end
local was = record()
redis.call('DEL', meta, tokens, turns, lock, gone)
return was
""")

# KEYS: a front end's. ARGV: ms.
KEEP_ALIVE = script("""
redis.call('DEL', KEYS[1]) -- as `insist`
if tonumber(ARGV[1]) > 0 then redis.call('SET', KEYS[1], '', 'PX', ARGV[1]) end
return {'OK'}
""")

# The scripts of `redis_counts`. KEYS: a tenant's count, a hash of tokens by session id, and of their sum by ''.


# ARGV: session id, tokens, whether to leave it as it is where it is counted, most sessions, most tokens (0: any
# number). Answers NEW or OLD, or what there is no room for: SESSIONS or TOKENS.
COUNT = script("""
local count, id, tokens = KEYS[1], ARGV[1], tonumber(ARGV[2])
local most_sessions, most_tokens = tonumber(ARGV[4]), tonumber(ARGV[5])
local before = redis.call('HGET', count, id)
if ARGV[3] == '0' then
  redis.call('HDEL', count, ' ') -- as `insist`: no id has a space
elseif before then
  return 'OLD'
end
if not before and most_sessions > 0 and redis.call('HLEN', count) > most_sessions then return 'SESSIONS' end
local sum = tonumber(redis.call('HGET', count, '') or 0) - tonumber(before or 0) + tokens
if most_tokens > 0 and tokens > 0 and sum > most_tokens then return 'TOKENS' end
redis.call('HSET', count, id, tokens, '', sum)
return before and 'OLD' or 'NEW'
""")

# ARGV: session ids.
UNCOUNT = script("""
for _, id in ipairs(ARGV) do
  local before = redis.call('HGET', KEYS[1], id)
  if before then
    redis.call('HDEL', KEYS[1], id)
    redis.call('HINCRBY', KEYS[1], '', 0 - tonumber(before)) -- never -0
  end
end
if redis.call('HLEN', KEYS[1]) == 1 then redis.call('DEL', KEYS[1]) end
return 'OK'
""")
