"""The commands' options: one frozen dataclass for each command, whose fields define its flags, file keys and --help.

    options = read_config(ServerConfig, argv)          # a bad value ends the process with exit code 2
    options = config_from(context.node_config, ClientConfig, "--node-config")     # a bad value raises ValueError

Importing this package imports neither torch nor numpy, so that --help is quick.
"""

from fedlora.config import values
from fedlora.config.arguments import Parser
from fedlora.config.client import ClientConfig
from fedlora.config.commands import CONFIGS
from fedlora.config.option import GROUPS, PRESET, Option, flag, option, options_of
from fedlora.config.parser import build_parser, config_from, read_config, shown
from fedlora.config.server import ServerConfig
from fedlora.config.shared import Config, LocalConfig, RunConfig
from fedlora.config.simulation import SimulationConfig
from fedlora.config.subcommands import Subcommand, Subcommands, faults_in_words, listed, run_subcommand

__all__ = ["CONFIGS", "GROUPS", "PRESET", "ClientConfig", "Config", "LocalConfig", "Option", "Parser", "RunConfig",
           "ServerConfig", "SimulationConfig", "Subcommand", "Subcommands", "build_parser", "config_from",
           "faults_in_words", "flag", "listed", "option", "options_of", "read_config", "run_subcommand", "shown",
           "values"]
