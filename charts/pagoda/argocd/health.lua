-- The health of an LLMService for Argo CD, from the conditions that kstatus reads too.
local status = obj.status
if status == nil or status.conditions == nil
    or status.observedGeneration ~= obj.metadata.generation then
  return {status = "Progressing", message = "The operator has not seen this spec yet."}
end

local conditions = {}
for _, condition in ipairs(status.conditions) do
  conditions[condition.type] = condition
end

local function health(name, condition)
  return {status = name, message = condition.reason .. ": " .. condition.message}
end

local ready, stalled = conditions.Ready, conditions.Stalled
if stalled ~= nil and stalled.status == "True" then
  return health("Degraded", stalled)
end
if ready == nil or ready.status ~= "True" then
  return health("Progressing", ready or {reason = "Unknown", message = "There is no condition."})
end
if ready.reason == "Suspended" then
  return health("Suspended", ready)
end
return health("Healthy", ready)
