-- HAProxy's part of the size limit for a body of unknown length (chunked): drop what follows the limit. The worker receives
-- a body that is slightly longer than the limit, and refuses it. Without this filter TorchServe closes the connection while
-- the body still arrives, and HAProxy 2.6 loses a third of the replies.

local LIMIT = 33554432 -- as req.body_size in sessions.cfg; max_request_size in config.properties is larger by four buffers

local BodyLimit = { id = "body_limit", flags = filter.FLT_CFG_FL_HTX }
BodyLimit.__index = BodyLimit

function BodyLimit:new()
  return setmetatable({ passed = 0 }, BodyLimit)
end

function BodyLimit:http_headers(txn, msg)
  if not msg:is_resp() and msg:get_headers()["transfer-encoding"] then
    filter.register_data_filter(self, msg.channel)
  end
end

-- Pass on or drop the whole buffer. HAProxy 2.6 stalls if a part is dropped, or if this returns 0 for a dropped one.
function BodyLimit:http_payload(txn, msg)
  local size = msg:input()
  if self.passed > LIMIT then
    msg:remove(0, size)
    return
  end
  self.passed = self.passed + size
  return size
end

core.register_filter("body_limit", BodyLimit, function(body_limit, args)
  return body_limit
end)
