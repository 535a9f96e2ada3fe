"""Who teaches whom: graphs by name or file, schedules over time, their figures and pictures."""
