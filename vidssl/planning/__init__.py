"""What a run will need, before it is started: parameters, arithmetic, memory, time, data, failures."""
