from rl_onoff.cli import main

main()
