"""What HTTP costs: engines, a server of them in this process, and a client of streams. bench_server_overhead.py is the
command.
"""
