"""Pipeline parallelism: schedules as plain lists of actions, and what plays them."""
